"""What the sampler remembers of a sequence between steps: its parameters and the tokens it has seen.

Bounded by the prompt's and the answer's distinct tokens, kept only where a penalty reads them, and dropped
when the sequence ends. The sampler owns it.
"""

from collections.abc import Iterable
from typing import Final

import numpy as np

from penstock.core.ids import SequenceId
from penstock.engine.sampling.vocabulary import Floats, Ints
from penstock.engine.scheduler.plan import NewSequence

FIRST_CAPACITY: Final = 32
ALL_TOKENS: Final = 2**31
"""More than any vocabulary has; still exact as a float64."""
BYTES_PER_COUNT: Final = 8 + 4 + 100
"""Id, count and the entry of the dictionary that finds them."""


class TokenCounts:
    """How often each token was generated, as arrays that a row of logits can be indexed with."""

    def __init__(self) -> None:
        self._index: dict[int, int] = {}
        self._ids = np.zeros(FIRST_CAPACITY, np.int64)
        self._counts = np.zeros(FIRST_CAPACITY, np.float32)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def ids(self) -> Ints:
        """Distinct ids, in the order in which they came."""
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> Floats:
        """How often, beside `ids`."""
        return self._counts[: len(self._index)]

    def add(self, token_id: int) -> None:
        """Count one more; amortised O(1)."""
        index = self._index.setdefault(token_id, len(self._index))
        if index == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[index] = token_id
        self._counts[index] += 1


class SequenceState:
    """One sequence's parameters and counts."""

    def __init__(self, new: NewSequence) -> None:
        params = new.params
        self.params = params
        self.seed = new.seed
        self.banned = new.banned_until_min_tokens if params.min_tokens else ()
        repeats = params.repetition_penalty != 1.0
        self.prompt_ids: Ints = np.unique(np.array(new.prompt_token_ids if repeats else [], dtype=np.int64))
        self.output = TokenCounts()
        self.draw_numbers = (
            0.0 if params.is_greedy else params.temperature,
            float(min(params.top_k, ALL_TOKENS)),
            params.top_p,
            params.min_p,
        )
        """Temperature (0 if greedy), top-k, top-p, min-p, for the arrays of a native call."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the token ids and counts, about."""
        return self.prompt_ids.nbytes + BYTES_PER_COUNT * len(self.output)

    def alters_logits(self, *, output_idx: int) -> bool:
        """True if the logits change before the choice of token number `output_idx`."""
        banned = self.banned and output_idx < self.params.min_tokens
        return bool(banned or self.params.logit_bias or self.params.has_penalties)

    def commit(self, token_id: int) -> None:
        """Count a token that is now part of the answer."""
        if self.params.has_penalties:
            self.output.add(token_id)


class SequenceStates:
    """The states of all sequences that the runner has met and not been told to forget."""

    def __init__(self) -> None:
        self._states: dict[SequenceId, SequenceState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, seq_id: SequenceId) -> bool:
        return seq_id in self._states

    def __getitem__(self, seq_id: SequenceId) -> SequenceState:
        return self._states[seq_id]

    @property
    def num_bytes(self) -> int:
        """Bytes of all states, about."""
        return sum(state.num_bytes for state in self._states.values())

    def add(self, new: Iterable[NewSequence]) -> None:
        """Meet sequences."""
        for sequence in new:
            self._states[sequence.seq_id] = SequenceState(sequence)

    def forget(self, seq_ids: Iterable[SequenceId]) -> None:
        """Drop sequences; ids that were never met are ignored."""
        for seq_id in seq_ids:
            self._states.pop(seq_id, None)
