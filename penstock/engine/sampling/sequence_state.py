"""What the sampler remembers of a sequence between steps: its parameters and the tokens it has seen.

Bounded by the prompt's and the answer's distinct tokens, kept only where a penalty reads them, and dropped
when the sequence ends. The sampler owns it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np

from penstock.core.ids import SequenceId
from penstock.engine.sampling.rare_filters import is_rare
from penstock.engine.sampling.token_history import TokenHistory, banned_continuations, dry_penalties
from penstock.engine.sampling.vocabulary import Floats, Ints
from penstock.engine.scheduler.constraint import Mask
from penstock.engine.scheduler.plan import NewSequence

FIRST_CAPACITY: Final = 32
MAX_PENALTY: Final = 1e30
"""Added to a float32 logit it still leaves a finite number."""
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
        self._banned_sequences = new.banned_sequences
        self._dry_breakers = frozenset(new.dry_breaker_ids)
        self._history = TokenHistory(new.prompt_token_ids) if _needs_order(new) else None
        self._num_prompt_tokens = len(new.prompt_token_ids)
        self._allowed_mask: Mask | None = None
        self.is_rare = is_rare(params)
        self.max_surprise = 2.0 * params.mirostat_tau
        """Mirostat's running bound, in bits."""
        self.last_surprise = 0.0
        """Of the token that was drawn last, and may yet be drawn again."""
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
        history = 0 if self._history is None else self._history.ids.nbytes
        mask = 0 if self._allowed_mask is None else self._allowed_mask.nbytes
        return self.prompt_ids.nbytes + history + mask + BYTES_PER_COUNT * len(self.output)

    @property
    def is_free_of_history(self) -> bool:
        """True if `commit` changes nothing."""
        return not (self.params.has_penalties or self.params.mirostat or self._history is not None)

    def alters_logits(self, *, output_idx: int) -> bool:
        """True if the logits change before the choice of token number `output_idx`."""
        banned = self.banned and output_idx < self.params.min_tokens
        params = self.params
        by_order = self._history is not None or params.allowed_token_ids
        return bool(banned or by_order or params.logit_bias or params.has_penalties)

    def banned_now(self, *, output_idx: int) -> Sequence[int]:
        """Tokens that cannot be token number `output_idx`: it is too early, or they would end a bad word."""
        early = self.banned if output_idx < self.params.min_tokens else ()
        if not self._banned_sequences:
            return early
        assert self._history is not None
        output = self._history.ids[self._num_prompt_tokens :]
        return [*early, *banned_continuations(output, banned=self._banned_sequences)]

    def biases(self) -> Mapping[int, float]:
        """What is added to which logits: the client's own, less what DRY takes away."""
        params = self.params
        if not params.dry_multiplier or self._history is None:
            return params.logit_bias
        biases = dict(params.logit_bias)
        penalties = dry_penalties(self._history.ids, params=params, breakers=self._dry_breakers)
        for token_id, penalty in penalties.items():
            biases[token_id] = biases.get(token_id, 0.0) - min(penalty, MAX_PENALTY)
        return biases

    def allowed_mask(self, vocab: int) -> Mask | None:
        """[ceil(vocab / 32)]: a bit for each token that may come; None allows all. Made once."""
        allowed = self.params.allowed_token_ids
        if allowed and self._allowed_mask is None:
            ids = np.array(allowed, np.int64)
            words = np.zeros(-(-vocab // 32), np.uint32)
            np.bitwise_or.at(words, ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))
            self._allowed_mask = words.view(np.int32)
        return self._allowed_mask

    def commit(self, token_id: int) -> None:
        """Count a token that is now part of the answer."""
        if self.params.has_penalties:
            self.output.add(token_id)
        if self._history is not None:
            self._history.append(token_id)
        if self.params.mirostat:
            error = self.last_surprise - self.params.mirostat_tau
            self.max_surprise -= self.params.mirostat_eta * error

    def commit_forced(self, token_ids: Sequence[int]) -> None:
        """Count tokens that came without a draw, because nothing else could come."""
        self.last_surprise = 0.0
        for token_id in token_ids:
            self.commit(token_id)


def _needs_order(new: NewSequence) -> bool:
    return bool(new.banned_sequences or new.params.dry_multiplier)


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
