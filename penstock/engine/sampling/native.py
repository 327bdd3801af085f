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
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from penstock.core.text import TokenLogprob, TokenLogprobs
from penstock.engine.sampling.sequence_state import SequenceState
from penstock.engine.sampling.uniform import uniforms
from penstock.engine.sampling.vocabulary import Doubles, Floats, Ints

if TYPE_CHECKING:  # the extension is not there on every machine
    from penstock.kernels.cpu import _native

Mask = npt.NDArray[np.int32]


class DrawStatus(IntEnum):
    """How a row's choice ended; the numbers are those of the extension."""

    DRAWN = 0
    NOT_FINITE = 1
    """The raw row has a NaN, or no finite maximum."""
    NONE_ALLOWED = 2
    """Masks and bans left no finite logit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeDraw:
    """One row's choice."""

    status: DrawStatus
    token_id: int
    """Meaningless unless drawn."""
    logprobs: TokenLogprobs | None
    """None unless drawn and asked for."""


class NativeSampler:
    """Draws tokens with the extension's `TokenSampler`. One call at a time."""

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
        masks: Mask | None,
    ) -> list[NativeDraw]:
        """Choose one token per draw; changes neither logits nor states.

        Args:
            logits: [num_rows, vocab] float32, C-contiguous.
            rows: [draws], the row that each draws from; may repeat.
            states: [draws], each sequence's parameters and history.
            output_idxs: [draws], how many tokens each answer has already.
            masks: [draws, ceil(vocab / 32)] int32, a bit for each token that may come; None allows all.

        Returns:
            [draws].

        Raises:
            IndexError: a bias, ban or penalty names a token outside the vocabulary.
        """
        assert logits.dtype == np.float32, logits.dtype
        assert logits.flags.c_contiguous, logits.strides
        vocab = logits.shape[1]
        row_of = np.array(rows, np.int64)
        assert not len(row_of) or 0 <= row_of.min() <= row_of.max() < len(logits), (rows, logits.shape)
        numbers = np.ascontiguousarray(np.array([state.draw_numbers for state in states]).reshape(-1, 4).T)
        top_k = numbers[1].astype(np.int64)
        chances = _uniforms(states, output_idxs=output_idxs, temperatures=numbers[0])
        edits = _Edits(states, output_idxs=output_idxs, masks=masks, vocab=vocab)
        answers = _Answers(states, vocab=vocab)
        self._sampler.sample(
            logits=logits.ctypes.data,
            row_stride=vocab,
            vocab=vocab,
            num_rows=len(states),
            rows=row_of.ctypes.data,
            temperatures=numbers[0].ctypes.data,
            top_k=top_k.ctypes.data,
            top_p=numbers[2].ctypes.data,
            min_p=numbers[3].ctypes.data,
            uniforms=chances.ctypes.data,
            edits=edits.of_rows,
            num_top=answers.num_top.ctypes.data,
            max_top=answers.max_top,
            tokens=answers.tokens.ctypes.data,
            statuses=answers.statuses.ctypes.data,
            logprobs=answers.logprobs.ctypes.data,
            ranks=answers.ranks.ctypes.data,
            top_ids=answers.top_ids.ctypes.data,
            top_logprobs=answers.top_logprobs.ctypes.data,
        )
        return answers.draws()


def _uniforms(
    states: Sequence[SequenceState], *, output_idxs: Sequence[int], temperatures: Doubles
) -> Doubles:
    """[draws]; greedy draws read none."""
    if not temperatures.any():
        return np.zeros(len(states))
    return uniforms([state.seed for state in states], output_idxs=list(output_idxs))


class _Edits:
    """What changes the rows before the choice, as addresses; keeps the arrays alive."""

    def __init__(
        self,
        states: Sequence[SequenceState],
        *,
        output_idxs: Sequence[int],
        masks: Mask | None,
        vocab: int,
    ) -> None:
        self._arrays: list[npt.NDArray[np.generic]] = []
        self.of_rows: list[tuple[int, _native.RowEdits]] = []
        words = None if masks is None else np.ascontiguousarray(masks, dtype="<i4")
        assert words is None or words.shape[1] * 32 >= vocab, (words.shape, vocab)
        for draw, (state, output_idx) in enumerate(zip(states, output_idxs, strict=True)):
            mask = None if words is None else words[draw]
            if mask is not None or state.alters_logits(output_idx=output_idx):
                self.of_rows.append((draw, self._of_row(state, output_idx=output_idx, mask=mask)))

    def _of_row(self, state: SequenceState, *, output_idx: int, mask: Mask | None) -> "_native.RowEdits":
        from penstock.kernels.cpu import _native

        params = state.params
        is_too_early = output_idx < params.min_tokens
        banned = np.array(state.banned if is_too_early else (), np.int64)
        biases = params.logit_bias or {}
        return _native.RowEdits(
            mask=0 if mask is None else self._address(mask),
            banned=self._address(banned),
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
        self._arrays.append(array)
        return array.ctypes.data


class _Answers:
    """The arrays that the extension writes."""

    def __init__(self, states: Sequence[SequenceState], *, vocab: int) -> None:
        asked = [state.params.logprobs for state in states]
        self.num_top: Ints = np.array([-1 if n is None else min(n, vocab) for n in asked], np.int64)
        self.max_top = max(0, int(self.num_top.max(initial=0)))
        self.tokens: Ints = np.empty(len(states), np.int64)
        self.statuses = np.empty(len(states), np.int32)
        self.logprobs: Doubles = np.empty(len(states))
        self.ranks: Ints = np.empty(len(states), np.int64)
        self.top_ids: Ints = np.empty((len(states), self.max_top), np.int64)
        self.top_logprobs: Doubles = np.empty((len(states), self.max_top))

    def draws(self) -> list[NativeDraw]:
        """What stands in the arrays."""
        return [
            NativeDraw(
                status=DrawStatus(status), token_id=token_id, logprobs=self._logprobs(row, status=status)
            )
            for row, (token_id, status) in enumerate(
                zip(self.tokens.tolist(), self.statuses.tolist(), strict=True)
            )
        ]

    def _logprobs(self, row: int, *, status: int) -> TokenLogprobs | None:
        num_top = int(self.num_top[row])
        if num_top < 0 or status != DrawStatus.DRAWN:
            return None
        sampled = TokenLogprob(int(self.tokens[row]), float(self.logprobs[row]), int(self.ranks[row]))
        ids = self.top_ids[row, :num_top].tolist()
        logprobs = self.top_logprobs[row, :num_top].tolist()
        top = (TokenLogprob(i, lp, rank) for rank, (i, lp) in enumerate(zip(ids, logprobs, strict=True), 1))
        return TokenLogprobs(sampled, tuple(top))
