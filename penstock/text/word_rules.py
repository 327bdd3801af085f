"""Sampling rules that clients state in words, as token ids: `bad_words` and DRY's sequence breakers.

The engine knows no text. Called by `service` for requests that state such rules.
"""

from functools import lru_cache
from typing import Final

from penstock.core.errors import InvalidParameterError
from penstock.core.params import SamplingParams
from penstock.text.tokenizer import Tokenizer

MAX_BREAKER_IDS: Final = 65_536
MAX_KEPT_RULES: Final = 8
"""Sets of breakers whose tokens are remembered: finding them reads the whole vocabulary."""


class WordRules:
    """Resolves rules with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int) -> None:
        """Keep the vocabulary; nothing is computed yet.

        Args:
            tokenizer: the model's.
            vocab_size: ids from here on cannot be drawn.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._breakers = lru_cache(MAX_KEPT_RULES)(self._find_breakers)

    def banned_sequences(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """The token sequences that spell a bad word, at the start of a text and after a space.

        Raises:
            InvalidParameterError: a word has no token.
        """
        found: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            for spelled in (word, f" {word.lstrip()}"):
                ids = tuple(self._tokenizer.encode(spelled, add_special_tokens=False, param="bad_words"))
                if not ids:
                    raise InvalidParameterError(
                        f"bad_words holds {word!r}, which has no token in this model's vocabulary",
                        param="bad_words",
                    )
                found[ids] = None
        return tuple(found)

    def dry_breaker_ids(self, params: SamplingParams) -> tuple[int, ...]:
        """The tokens that hold a sequence breaker; empty if DRY is off.

        Raises:
            InvalidParameterError: there are too many.
        """
        return self._breakers(params.dry_sequence_breakers) if params.dry_multiplier else ()

    def _find_breakers(self, breakers: tuple[str, ...]) -> tuple[int, ...]:
        spelled = [breaker.encode() for breaker in breakers]
        ids = tuple(
            token_id
            for token_id in range(self._vocab_size)
            if any(each in self._tokenizer.token_bytes(token_id) for each in spelled)
        )
        if len(ids) > MAX_BREAKER_IDS:
            raise InvalidParameterError(
                f"dry_sequence_breakers stand in {len(ids)} tokens of the vocabulary, the limit is "
                f"{MAX_BREAKER_IDS}",
                param="dry_sequence_breakers",
            )
        return ids
