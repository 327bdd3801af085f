"""From a `GrammarSpec` to a matcher at its start, within limits and cached by content.

llguidance derives lexers lazily and parses by Earley's algorithm, so that a grammar costs what an answer
touches of it; fuel bounds each part. Called by `compile_pool` from its threads; thread-safe.
"""

import logging
import threading
import time
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from penstock.core.errors import CheckpointError, InvalidParameterError
from penstock.core.grammar import GRAMMAR_PARAM, GrammarSpec, validate_grammar
from penstock.engine.grammar.cache import GrammarCache
from penstock.engine.grammar.compiled import Compiled
from penstock.engine.grammar.dialects import to_llguidance
from penstock.engine.grammar.schema_rewrite import SchemaTooLargeError
from penstock.text.tokenizer import Tokenizer

LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=100_000,
    step_max_items=2_500,
    max_items_in_row=2_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""Fuel is what the parser counts, so that a limit means the same on every machine: compiling takes at most
some 200 ms (and the GIL for a few of them at a time), a mask some 5 ms, the states of a lexer 4 MB. Errors do
not repeat grammar or answer. Items of an ambiguous grammar cost ever more: 6,000 of them took 27 ms, 2,500
take 6; no schema was found whose masks need as many and whose rows fit."""
MAX_FIRST_TOKENS: Final = 8
"""First tokens of an answer behind which a grammar is tried, when it is compiled."""
MAX_CACHE_BYTES: Final = 64 << 20
BYTES_PER_GRAMMAR: Final = 1 << 20
"""What an entry is charged beside its source: a plain grammar takes less, the limit of states allows more."""
BYTES_PER_SOURCE_BYTE: Final = 64
"""Measured: schemas of 15 KB take 0.8 MB."""
FREE_COMPILE_CPU_S: Final = 0.02
BYTES_PER_COMPILE_CPU_S: Final = 200 << 20
"""Charged for what a compilation takes beyond: measured, `a{100000}` takes 0.14 s and 27 MB."""
MAX_REASON_CHARS: Final = 300
NOTHING_FITS: Final = "NoExtensionBias"
"""The error of a matcher whose first mask is empty."""
MAX_REWRITTEN_CHARS: Final = 1 << 15
"""Longer schemas are not rewritten: it is done in Python, while the step loop waits for the interpreter."""

log = logging.getLogger("penstock.engine.grammar")


def refusal(spec: GrammarSpec, reason: str) -> InvalidParameterError:
    """The 400 for a grammar that cannot be enforced."""
    return InvalidParameterError(
        f"{GRAMMAR_PARAM} holds a {spec.kind} that cannot be enforced: {reason[:MAX_REASON_CHARS]}",
        code="invalid_grammar",
        param=GRAMMAR_PARAM,
    )


class GrammarCompiler:
    """Compiles for one tokenizer, and keeps what came of it in a `GrammarCache`."""

    def __init__(self, folder: Path, *, max_cache_bytes: int = MAX_CACHE_BYTES) -> None:
        """Do nothing yet.

        Args:
            folder: of the model, with its `tokenizer.json`.
            max_cache_bytes: for compiled grammars; one alone may be larger.
        """
        self._folder = folder
        self._tokenizer: LLTokenizer | None = None
        self._special_ids: dict[str, int] = {}
        self._reading = threading.Lock()
        """Held while the vocabulary is read."""
        self._cache = GrammarCache(max_bytes=max_cache_bytes)

    @property
    def num_bytes(self) -> int:
        """Charged for cached grammars."""
        return self._cache.num_bytes

    def prepare(self) -> LLTokenizer:
        """Read the vocabulary, once; takes 50 ms for 4,000 tokens and 1.5 s for 150,000, and holds the GIL.

        Raises:
            CheckpointError: the folder has no tokenizer, or one that is not known here.
            ValueError: llguidance does not know its kind.
        """
        with self._reading:
            if self._tokenizer is None:
                tokenizer = Tokenizer.from_folder(self._folder)
                made = LLTokenizer(tokenizer.to_json(), eos_token=list(tokenizer.eos_token_ids))
                added = tokenizer.added_ids_by_text
                # Not only those marked special: what is written <so> is a token of its own to llguidance.
                self._special_ids = {text: i for text, i in added.items() if made.is_special_token(i)}
                self._tokenizer = made
            return self._tokenizer

    def warm_up(self) -> None:
        """`prepare` before the first request; a model that cannot have grammars is told of in the log."""
        try:
            self.prepare()
        except (CheckpointError, ValueError) as error:
            log.warning("this model serves no structured outputs: %s", error)

    def cached(self, spec: GrammarSpec) -> Compiled | None:
        """What is known of this grammar.

        Raises:
            InvalidParameterError: it was refused before.
        """
        return self._cache.find(spec)

    def compile(self, spec: GrammarSpec) -> Compiled:
        """Compile a grammar and its first mask; releases the GIL meanwhile. Does not look into the cache.

        Raises:
            InvalidParameterError: it is malformed, asks for what cannot be enforced, or is beyond a limit.
        """
        try:
            compiled = self._compile(spec)
        except InvalidParameterError as error:
            self._cache.put_refusal(spec, error)
            raise
        self._cache.put(spec, compiled)
        return compiled

    def _compile(self, spec: GrammarSpec) -> Compiled:
        validate_grammar(spec)
        try:
            tokenizer = self.prepare()
            source = to_llguidance(spec, special_ids=self._special_ids)
        except CheckpointError as error:
            raise refusal(spec, f"the model has no tokenizer for it: {error.message}") from None
        except ValueError as error:
            raise refusal(spec, str(error)) from None
        began_s = time.thread_time()
        start = _started(tokenizer, source)
        if start.is_error() and len(spec.source) <= MAX_REWRITTEN_CHARS:
            start = self._second_attempt(spec, tokenizer, source) or start
        if start.is_error():
            raise refusal(spec, _reason(start))
        num_bytes = _num_bytes(spec, cpu_s=time.thread_time() - began_s)
        forget, charge = partial(self._cache.forget, spec), partial(self._cache.charge, spec)
        return Compiled(start=start, tokenizer=tokenizer, forget=forget, charge=charge, num_bytes=num_bytes)

    def _second_attempt(self, spec: GrammarSpec, tokenizer: LLTokenizer, first: str) -> LLMatcher | None:
        """With its JSON Schemas in other keywords; None if that is no help."""
        try:
            source = to_llguidance(spec, special_ids=self._special_ids, rewrites=True)
        except SchemaTooLargeError:
            return None
        second = None if source == first else _started(tokenizer, source)
        return None if second is None or second.is_error() else second


def _num_bytes(spec: GrammarSpec, *, cpu_s: float) -> int:
    """About how many bytes a grammar takes, by its length and by the CPU time that it took to compile."""
    states = int(max(cpu_s - FREE_COMPILE_CPU_S, 0.0) * BYTES_PER_COMPILE_CPU_S)
    return BYTES_PER_GRAMMAR + BYTES_PER_SOURCE_BYTE * len(spec.source) + states


def _started(tokenizer: LLTokenizer, source: str) -> LLMatcher:
    """A matcher that has its first mask, so that its first lexer states are not derived in a step.

    In error also if what it forces or allows first would be: a grammar of which nothing can be generated is
    refused, not compiled.
    """
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=LIMITS)
    if matcher.is_error():
        return matcher
    mask = matcher.compute_bitmask()
    ahead = matcher.deep_copy()
    forced = ahead.compute_ff_tokens()
    if forced:
        ahead.consume_tokens(forced[: ahead.validate_tokens(forced)])
        mask = ahead.compute_bitmask()
    if matcher.is_error() or ahead.is_error():
        return matcher if matcher.is_error() else ahead
    for token_id in _first_tokens(mask):
        behind = ahead.deep_copy()
        if behind.validate_tokens([token_id]):  # not where a mask spells text as a special token
            behind.consume_token(token_id)
        if behind.is_error() and not matcher.is_error():
            return behind
    return matcher


def _first_tokens(mask: bytes) -> list[int]:
    """At most `MAX_FIRST_TOKENS` of those that a mask allows."""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    token_ids: list[int] = np.flatnonzero(bits)[:MAX_FIRST_TOKENS].tolist()
    return token_ids


def _reason(matcher: LLMatcher) -> str:
    """Llguidance's words in one line, without its marks."""
    lines = matcher.get_error().replace("<non-verbose/>", "").splitlines()
    words = " ".join(line.strip() for line in lines if line.strip()) or matcher.stop_reason()
    return "nothing satisfies it" if words == NOTHING_FITS else words
