"""`Constraint` over llguidance's matcher: one answer's place in its grammar."""

import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

from penstock.core.tokens import EngineRequest
from penstock.engine.grammar.compiled import Compiled

NO_BITS: Final = np.int32(0)
MARK_OF_SPECIAL: Final = b"\xff"
"""Stands before a special token in llguidance's bytes; no text has it."""
FREE_CPU_S: Final = 0.05
"""CPU time that the masks and moves of one answer may take, beside `CPU_PER_MASK_S` for each."""
CPU_PER_MASK_S: Final = 0.003
"""A usual mask takes a thirtieth of it; an answer that takes more fails, so that a step is not its own."""
SLOW_MASK_CPU_S: Final = 0.001
BYTES_PER_SLOW_CPU_S: Final = 100 << 20
"""A mask that takes so long has derived new lexer states; measured: 70 to 100 MB of them in a second."""


class Matcher:
    """See `Constraint` for who calls what. Not thread-safe."""

    def __init__(
        self,
        matcher: LLMatcher,
        *,
        tokenizer: LLTokenizer,
        vocab_size: int,
        num_words: int,
        end_ids: frozenset[int],
        avoided_ids: tuple[int, ...],
        on_failure: Callable[[], None],
        on_growth: Callable[[int], None],
    ) -> None:
        """Take over a matcher.

        Args:
            matcher: nobody else moves it.
            tokenizer: that it was made with.
            vocab_size: of the model; greater ids are never forced.
            num_words: of llguidance's masks, 32 tokens each.
            end_ids: end-of-sequence tokens of the vocabulary.
            avoided_ids: end-of-sequence tokens that come only where nothing else may (`ignore_eos`).
            on_failure: called when it cannot go on: what its lexer shares with others may be spoilt.
            on_growth: called with the bytes, about, by which what it shares with others has grown.
        """
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._num_words = num_words
        self._end_ids = end_ids
        self._avoided_ids = avoided_ids
        self._on_failure = on_failure
        self._on_growth = on_growth
        self._failure: str | None = None
        self._cpu_left_s = FREE_CPU_S

    @property
    def is_complete(self) -> bool:
        """See `Constraint`."""
        return self._failure is None and self._matcher.is_stopped()

    @property
    def may_end(self) -> bool:
        """See `Constraint`."""
        return self._failure is None and self._matcher.is_accepting()

    @property
    def failure(self) -> str | None:
        """See `Constraint`."""
        return self._failure

    def accept(self, token_id: int) -> None:
        """See `Constraint`."""
        began_s = time.thread_time()
        self._matcher.consume_token(token_id)
        self._look_for_failure()
        self._cpu_left_s -= time.thread_time() - began_s

    def forced(self) -> tuple[int, ...]:
        """See `Constraint`."""
        token_ids = self._matcher.compute_ff_tokens()
        known = next((i for i, each in enumerate(token_ids) if each >= self._vocab_size), len(token_ids))
        forced = token_ids[:known]
        num_valid = self.num_valid(forced)
        if forced and not num_valid:
            forced = self._plain_forced()
            num_valid = self.num_valid(forced)
        return tuple(forced[:num_valid])

    def num_valid(self, draft_token_ids: Sequence[int]) -> int:
        """See `Constraint`; an end is never one: llguidance's `rollback` does not count it."""
        end = next((i for i, each in enumerate(draft_token_ids) if each in self._end_ids), None)
        return self._matcher.validate_tokens(list(draft_token_ids[:end]))

    def fill(self, rows: npt.NDArray[np.int32], *, draft_token_ids: Sequence[int] = ()) -> None:
        """See `Constraint`; releases the GIL while llguidance works."""
        began_s = time.thread_time()
        self._fill(rows[0])
        for depth, token_id in enumerate(draft_token_ids, 1):
            self._matcher.consume_token(token_id)
            self._fill(rows[depth])
        if draft_token_ids:
            self._matcher.rollback(len(draft_token_ids))
        self._look_for_failure()
        spent_s = time.thread_time() - began_s
        if spent_s > SLOW_MASK_CPU_S * len(rows):
            self._on_growth(int(spent_s * BYTES_PER_SLOW_CPU_S))
        self._cpu_left_s += len(rows) * CPU_PER_MASK_S - spent_s
        self._cpu_left_s = min(self._cpu_left_s, FREE_CPU_S)
        if self._cpu_left_s < 0:
            self._failure = "the grammar cannot go on: its masks take too much CPU time"

    def fork(self) -> "Matcher":
        """See `Constraint`."""
        return Matcher(
            self._matcher.deep_copy(),
            tokenizer=self._tokenizer,
            vocab_size=self._vocab_size,
            num_words=self._num_words,
            end_ids=self._end_ids,
            avoided_ids=self._avoided_ids,
            on_failure=self._on_failure,
            on_growth=self._on_growth,
        )

    def _fill(self, row: npt.NDArray[np.int32]) -> None:
        words = row if len(row) >= self._num_words else np.empty(self._num_words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, 4 * self._num_words)
        if words is row:
            row[self._num_words :] = NO_BITS  # the model has more tokens than the tokenizer
        else:
            row[:] = words[: len(row)]
        if (only := _only_token(row)) is not None and not self.may_end and not self.num_valid([only]):
            plain = self._plain_forced()
            if plain:
                row[only // 32] = NO_BITS
                row[plain[0] // 32] = np.uint32(1 << plain[0] % 32).view(np.int32)
        if self._avoided_ids:
            _avoid(row, token_ids=self._avoided_ids)

    def _plain_forced(self) -> list[int]:
        """The forced text in tokens that are not special.

        llguidance gives text that spells a special token as that token, and then does not accept it.
        """
        text = self._matcher.compute_ff_bytes().split(MARK_OF_SPECIAL, 1)[0]
        return self._tokenizer.greedy_tokenize(text.decode(errors="ignore"))

    def _look_for_failure(self) -> None:
        if self._failure is None and self._matcher.is_error():
            self._on_failure()
            self._failure = (
                f"the grammar cannot go on ({self._matcher.stop_reason()}): it is too complex for its limits"
            )


def start_matcher(compiled: Compiled, request: EngineRequest, *, vocab_size: int) -> Matcher:
    """A matcher at the beginning of an answer to `request`."""
    return Matcher(
        compiled.start.deep_copy(),
        tokenizer=compiled.tokenizer,
        vocab_size=vocab_size,
        num_words=-(-compiled.tokenizer.vocab_size // 32),
        end_ids=frozenset(compiled.tokenizer.eos_tokens),
        avoided_ids=request.eos_token_ids if request.params.ignore_eos else (),
        on_failure=compiled.forget,
        on_growth=compiled.charge,
    )


def _only_token(row: npt.NDArray[np.int32]) -> int | None:
    """The one token that a row allows; None if it allows none or several."""
    (words,) = np.nonzero(row)
    if len(words) != 1:
        return None
    bits = int(row[words[0]]) & 0xFFFFFFFF
    return None if bits & (bits - 1) else 32 * int(words[0]) + bits.bit_length() - 1


def _avoid(row: npt.NDArray[np.int32], *, token_ids: Sequence[int]) -> None:
    """Forbid tokens, unless the row allows no others."""
    rest = row.copy().view(np.uint32)
    for token_id in token_ids:
        rest[token_id // 32] &= np.uint32(~(1 << token_id % 32) & 0xFFFFFFFF)
    if rest.any():
        row[:] = rest.view(np.int32)
