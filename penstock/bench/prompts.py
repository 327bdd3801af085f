"""Prompts of a given length, from a seed: token ids where the server takes them, else words.

A prompt is a row of segments; a segment has a key and a length, and equal keys give equal content, so that
shared prefixes and the blocks of a trace are shared in the load too. Nothing here is natural language: what a
model answers does not matter, how long it takes does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np

from penstock.bench.workload import Prompt
from penstock.core.errors import InvalidParameterError
from penstock.text.tokenizer import Tokenizer

DEFAULT_TOKEN_IDS: Final = (300, 4000)
"""Half-open; ordinary tokens in every vocabulary in use: above bytes and special tokens, below the end."""
MIN_WORDS: Final = 64
"""Fewer different words would make prompts that begin alike by chance."""
_WORD_LIST: Final = """
the and you that was for are with his they this have from one had word but not what all were when your can
said there use each which she how their will other about out many then them these some her would make like
him into time has look two more write see number way could people than first water been call who oil now
find long down day did get come made may part over new sound take only little work know place year live
back give most very after thing our just name good man think say great where help through much before line
right too mean old any same tell boy follow came want show also around form three small set put end does
another well large must big even such because turn here why ask went men read need land home us move try
kind hand again change off play air away animal house point page letter mother answer found study still
learn should world high every near add food between own below country plant last school father keep tree
never start city earth eye light thought head under story saw left few while along might close something
seem next hard open begin life always those both paper together got group often run important until
children side
"""
WORDS: Final = tuple(_WORD_LIST.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A part of a prompt."""

    key: tuple[int, ...]
    """Equal keys give equal content; numbers at least 0."""
    num_tokens: int


PREFIX, OWN, BLOCK, WARMUP, PROBE = range(5)
"""First number of a key: a shared prefix, a request's own part, a block of a trace, a warm-up request, a
question before the load. Only what is meant to be shared has a key in common."""


class PromptWriter(Protocol):
    """Makes prompts."""

    def write(self, segments: Sequence[Segment]) -> Prompt:
        """The prompt of these segments; the same ones give the same prompt."""
        ...

    def with_seed(self, seed: int) -> "PromptWriter":
        """A writer of other prompts, so that no cache knows them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIdWriter:
    """Prompts as token ids, uniform over a range, special tokens left out."""

    seed: int
    low: int = DEFAULT_TOKEN_IDS[0]
    high: int = DEFAULT_TOKEN_IDS[1]
    """Half-open."""
    special_ids: frozenset[int] = frozenset()

    def write(self, segments: Sequence[Segment]) -> tuple[int, ...]:
        """See `PromptWriter`."""
        found: list[int] = []
        for segment in segments:
            rng = np.random.default_rng([self.seed, *segment.key])
            drawn = rng.integers(self.low, self.high, size=segment.num_tokens).tolist()
            found.extend(self._ordinary(token_id) for token_id in drawn)
        return tuple(found)

    def with_seed(self, seed: int) -> "TokenIdWriter":
        """See `PromptWriter`."""
        return replace(self, seed=seed)

    def _ordinary(self, token_id: int) -> int:
        return self.low if token_id in self.special_ids else token_id


@dataclass(frozen=True, slots=True, kw_only=True)
class WordWriter:
    """Prompts as text of common words; how many tokens they are was asked of the server (`Scale`)."""

    seed: int
    words: tuple[str, ...] = WORDS
    tokens_per_word: float = 1.0
    num_extra_tokens: float = 0.0
    """What the server adds to every prompt: BOS, the chat template."""

    def write(self, segments: Sequence[Segment]) -> str:
        """See `PromptWriter`; what the server adds is taken off the last segment, which keeps one word.

        Each word has its space before it: then it is the same token at the start of a text as elsewhere.
        """
        chosen: list[str] = []
        for place, segment in enumerate(segments):
            is_last = place == len(segments) - 1
            wanted = segment.num_tokens - (self.num_extra_tokens if is_last else 0.0)
            num_words = max(round(wanted / self.tokens_per_word), 1 if is_last else 0)
            rng = np.random.default_rng([self.seed, *segment.key])
            chosen.extend(self.words[i] for i in rng.integers(0, len(self.words), size=num_words).tolist())
        return "".join(f" {word}" for word in chosen)

    def with_seed(self, seed: int) -> "WordWriter":
        """See `PromptWriter`."""
        return replace(self, seed=seed)


def token_id_writer(
    *, seed: int, tokenizer: Tokenizer | None = None, low: int | None = None, high: int | None = None
) -> TokenIdWriter:
    """A writer over the given range, else over the ordinary tokens of `tokenizer`, else `DEFAULT_TOKEN_IDS`.

    Raises:
        InvalidParameterError: an empty range, or one beyond the vocabulary.
    """
    end = DEFAULT_TOKEN_IDS[1] if tokenizer is None else tokenizer.vocab_size
    low = DEFAULT_TOKEN_IDS[0] if low is None else low
    high = end if high is None else high
    if not 0 <= low < high or (tokenizer is not None and high > tokenizer.vocab_size):
        limit = f", at most {tokenizer.vocab_size}" if tokenizer is not None else ""
        raise InvalidParameterError(
            f"random_token_ids is {low}:{high}, it must be LOW:HIGH with 0 <= LOW < HIGH{limit}",
            param="random_token_ids",
        )
    special_ids = frozenset() if tokenizer is None else frozenset(tokenizer.table.special_ids)
    return TokenIdWriter(seed=seed, low=low, high=high, special_ids=special_ids - {low})


def one_token_words(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The words that are one token behind a space, so that a text of n of them has n tokens.

    Raises:
        InvalidParameterError: too few, as in a vocabulary of another script.
    """
    found = tuple(w for w in WORDS if len(tokenizer.encode(f" {w}", add_special_tokens=False)) == 1)
    if len(found) < MIN_WORDS:
        raise InvalidParameterError(
            f"tokenizer has {len(found)} of the common words as one token, there must be {MIN_WORDS}: "
            "leave it out, lengths are then measured by the server's usage",
            param="tokenizer",
        )
    return found
