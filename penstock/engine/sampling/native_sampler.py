"""The sampler's passes over the vocabulary in C++, on the pool of threads that runs the model.

The same steps, order of sums and order of the CDF as the numpy files beside it, which stay its reference: the
same seed draws the same token, unless its uniform number lies within 1e-5 of the mass beside a border, where
float32 rounds differently. `sampler` calls it; whoever builds the runner makes it, if the extension is there:

```
pool = ...                                     # the kernel set's _native.Pool
Sampler(native=NativeSampler(pool, isa="avx512"))
```
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from penstock.core.text import TokenLogprob, TokenLogprobs
from penstock.engine.sampling.masks import joined
from penstock.engine.sampling.ports import Draws, DrawStatus
from penstock.engine.sampling.sequence_state import SequenceState
from penstock.engine.sampling.uniform import stream_starts, uniforms_of
from penstock.engine.sampling.vocabulary import Floats
from penstock.engine.scheduler.constraint import Mask

if TYPE_CHECKING:  # the extension is not there on every machine
    from penstock.kernels.cpu import _native

FEW_DRAWS: Final = 16
"""Room for these at first; it doubles when a batch is larger."""


class NativeSampler:
    """Draws tokens with the extension's `TokenSampler`; a `HostSampler`. One call at a time."""

    def __init__(self, pool: "_native.Pool", *, isa: str) -> None:
        """Take no memory yet; the first call takes about 40 bytes a token of the vocabulary and thread.

        Args:
            pool: the threads; the model's, so that two pools do not fight for the cores.
            isa: one of `_native.supported_isas()`.

        Raises:
            ValueError: this CPU has no such instruction set.
        """
        from penstock.kernels.cpu import _native

        self._sampler = _native.TokenSampler(pool, isa)
        self._desk = _Desk(num_draws=FEW_DRAWS, num_top=0)
        self._desk_ahead = _Desk(num_draws=FEW_DRAWS, num_top=0)
        """Of draws that were prepared and are yet to be read."""

    @property
    def num_bytes(self) -> int:
        """Bytes of scratch that stay between calls."""
        return self._sampler.num_bytes

    def sample(
        self,
        logits: Floats,
        *,
        rows: Sequence[int],
        states: Sequence[SequenceState],
        output_idxs: Sequence[int],
        masks: Sequence[Mask | None] | None,
    ) -> Draws:
        """As `HostSampler.sample`."""
        assert logits.dtype == np.float32, logits.dtype
        assert logits.flags.c_contiguous, logits.strides
        assert not rows or 0 <= min(rows) <= max(rows) < len(logits), (rows, logits.shape)
        vocab = logits.shape[1]
        desk = self._desk = _desk_with(self._desk, rows, states=states, vocab=vocab)
        desk.number_draws(output_idxs)
        edits = None
        if masks is not None or desk.may_edit:
            edits = _Edits(states, output_idxs=output_idxs, masks=masks, vocab=vocab)
        self._sampler.sample(
            logits=logits.__array_interface__["data"][0],
            row_stride=vocab,
            vocab=vocab,
            num_rows=len(states),
            edits=edits.of_rows if edits else [],
            max_top=desk.num_top,
            **desk.addresses,
        )
        return desk.draws()

    def prepare(
        self, *, states: Sequence[SequenceState], output_idxs: list[int], vocab: int
    ) -> "_native.PreparedDraws | None":
        """As `HostSampler.prepare`."""
        from penstock.kernels.cpu import _native

        rows = list(range(len(states)))
        desk = self._desk_ahead = _desk_with(self._desk_ahead, rows, states=states, vocab=vocab)
        if desk.may_edit:
            return None
        if desk.prepared is None:
            desk.prepared = _native.PreparedDraws(
                self._sampler,
                vocab=vocab,
                num_rows=len(states),
                starts=desk.starts_address,
                max_top=desk.num_top,
                **desk.addresses,
            )
        desk.prepared.number(output_idxs)
        return desk.prepared

    def prepared_draws(self) -> Draws:
        """As `HostSampler.prepared_draws`."""
        return self._desk_ahead.draws()


def _desk_with(desk: "_Desk", rows: Sequence[int], *, states: Sequence[SequenceState], vocab: int) -> "_Desk":
    """A desk with these draws on it; they lie there already where they are those of the call before."""
    if desk.draws_taken != (rows, states, vocab):
        num_top = [-1 if (n := state.params.logprobs) is None else min(n, vocab) for state in states]
        most_top = max(num_top, default=0)
        if len(states) > desk.num_draws or most_top > desk.num_top:
            room = max(desk.num_draws, 2 ** (len(states) - 1).bit_length())
            desk = _Desk(num_draws=room, num_top=max(desk.num_top, most_top))
        desk.take(rows, states=states, num_top=num_top)
        desk.draws_taken = (list(rows), list(states), vocab)
    return desk


class _Desk:
    """The arrays that the extension reads and writes, kept from call to call, for speed."""

    def __init__(self, *, num_draws: int, num_top: int) -> None:
        self.num_draws = num_draws
        self.num_top = max(0, num_top)
        self.draws_taken: tuple[Sequence[int], Sequence[SequenceState], int] = ([], [], 0)
        """Rows, states and vocabulary of the draws whose numbers are in the arrays."""
        self.may_edit = False
        """True if something may change a row of theirs before the choice."""
        self.prepared: _native.PreparedDraws | None = None
        """These draws for a call that brings their logits later, once asked for."""
        self._num_top_of: list[int] = []
        self._starts: npt.NDArray[np.uint64] | None = None
        """[draws]: of their streams of random numbers; None if all are greedy."""
        self._rows = np.zeros(num_draws, np.int64)
        self._numbers = np.zeros((5, num_draws))
        self._num_top = np.zeros(num_draws, np.int64)
        self._tokens = np.zeros(num_draws, np.int64)
        self._statuses = np.zeros(num_draws, np.int32)
        self._logprobs = np.zeros(num_draws)
        self._ranks = np.zeros(num_draws, np.int64)
        self._top_ids = np.zeros((num_draws, self.num_top), np.int64)
        self._top_logprobs = np.zeros((num_draws, self.num_top))
        names = ("temperatures", "top_k", "top_p", "min_p", "uniforms")
        self.addresses = {name: row.ctypes.data for name, row in zip(names, self._numbers, strict=True)} | {
            "rows": self._rows.ctypes.data,
            "num_top": self._num_top.ctypes.data,
            "tokens": self._tokens.ctypes.data,
            "statuses": self._statuses.ctypes.data,
            "logprobs": self._logprobs.ctypes.data,
            "ranks": self._ranks.ctypes.data,
            "top_ids": self._top_ids.ctypes.data,
            "top_logprobs": self._top_logprobs.ctypes.data,
        }

    def take(self, rows: Sequence[int], *, states: Sequence[SequenceState], num_top: list[int]) -> None:
        """Write what stays the same from one step to the next."""
        num = len(states)
        self._rows[:num] = rows
        self._num_top[:num] = num_top
        self._num_top_of = num_top
        self._numbers[:4, :num] = np.array([state.draw_numbers for state in states]).reshape(num, 4).T
        is_random = bool(self._numbers[0, :num].any())
        self._starts = stream_starts([state.seed for state in states]) if is_random else None
        self.may_edit = any(state.alters_logits(output_idx=0) for state in states)
        self.prepared = None

    @property
    def starts_address(self) -> int:
        """Of the starts of the streams of random numbers, 0 if all are greedy."""
        return 0 if self._starts is None else self._starts.ctypes.data

    def number_draws(self, output_idxs: Sequence[int]) -> None:
        """Write the uniform numbers of these tokens of the answers; greedy draws read none."""
        if self._starts is not None:
            self._numbers[4, : len(output_idxs)] = uniforms_of(self._starts, output_idxs=output_idxs)

    def draws(self) -> Draws:
        """What the extension wrote."""
        num = len(self._num_top_of)
        # As a list made there: numpy's calls cost 10 us each after a pass over the weights.
        tokens = self.prepared.tokens() if self.prepared and max(self._num_top_of) < 0 else None
        if tokens is not None:
            return Draws(statuses=[DrawStatus.DRAWN] * num, token_ids=tokens, logprobs=[None] * num)
        statuses = self._statuses[:num].tolist()
        logprobs: list[TokenLogprobs | None] = [None] * num
        for draw, (top, status) in enumerate(zip(self._num_top_of, statuses, strict=True)):
            if top >= 0 and status == DrawStatus.DRAWN:
                logprobs[draw] = self._logprobs_of(draw, num_top=top)
        return Draws(statuses=statuses, token_ids=self._tokens[:num].tolist(), logprobs=logprobs)

    def _logprobs_of(self, draw: int, *, num_top: int) -> TokenLogprobs:
        sampled = TokenLogprob(int(self._tokens[draw]), float(self._logprobs[draw]), int(self._ranks[draw]))
        ids = self._top_ids[draw, :num_top].tolist()
        logprobs = self._top_logprobs[draw, :num_top].tolist()
        top = (TokenLogprob(i, lp, rank) for rank, (i, lp) in enumerate(zip(ids, logprobs, strict=True), 1))
        return TokenLogprobs(sampled, tuple(top))


class _Edits:
    """What changes the rows before the choice, as addresses; keeps the arrays alive."""

    def __init__(
        self,
        states: Sequence[SequenceState],
        *,
        output_idxs: Sequence[int],
        masks: Sequence[Mask | None] | None,
        vocab: int,
    ) -> None:
        self._arrays: list[npt.NDArray[np.generic]] = []
        self.of_rows: list[tuple[int, _native.RowEdits]] = []
        for draw, (state, output_idx) in enumerate(zip(states, output_idxs, strict=True)):
            mask = joined(None if masks is None else masks[draw], state.allowed_mask(vocab))
            if mask is not None:
                mask = np.ascontiguousarray(mask, dtype="<i4")
                assert len(mask) * 32 >= vocab, (mask.shape, vocab)
            if mask is not None or state.alters_logits(output_idx=output_idx):
                self.of_rows.append((draw, self._of_row(state, output_idx=output_idx, mask=mask)))

    def _of_row(self, state: SequenceState, *, output_idx: int, mask: Mask | None) -> "_native.RowEdits":
        from penstock.kernels.cpu import _native

        params = state.params
        banned = state.banned_now(output_idx=output_idx)
        biases = state.biases()
        return _native.RowEdits(
            mask=0 if mask is None else self._address(mask),
            banned=self._address(np.array(banned, np.int64)),
            num_banned=len(banned),
            biased=self._address(np.fromiter(biases.keys(), np.int64, len(biases))),
            biases=self._address(np.fromiter(biases.values(), np.float32, len(biases))),
            num_biased=len(biases),
            prompt=self._address(state.prompt_ids),
            num_prompt=len(state.prompt_ids),
            answer=self._address(state.output.ids),
            counts=self._address(state.output.counts),
            num_answer=len(state.output),
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
        )

    def _address(self, array: npt.NDArray[np.generic]) -> int:
        if not array.size:
            return 0
        self._arrays.append(array)
        return array.ctypes.data
