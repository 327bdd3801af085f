"""What a faster way to sample looks like: `sampler` keeps the order and the meaning, these compute it.

`HostSampler` reads logits in host memory and answers at once (`native_sampler`, in C++). `DeviceSampler`
reads them where the model left them and only queues its work (`triton_sampler`): what it draws lies on the
device until the step is collected, and the next step may take its token from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final, Protocol

from torch import Tensor

from penstock.core.text import TokenLogprob, TokenLogprobs
from penstock.engine.sampling.sequence_state import SequenceState
from penstock.engine.sampling.vocabulary import Doubles, Floats
from penstock.engine.scheduler.constraint import Mask

if TYPE_CHECKING:  # the extension is not there on every machine
    from penstock.kernels.cpu import _native

TOKEN: Final = 0
STATUS: Final = 1
LOGPROB: Final = 2
RANK: Final = 3
TOP: Final = 4
"""Columns of a `DeviceSampler`'s table; the `k` likeliest ids begin at TOP, their logprobs at TOP + k."""


class DrawStatus(IntEnum):
    """How a row's choice ended; the numbers are those of the extension."""

    DRAWN = 0
    NOT_FINITE = 1
    """The raw row has a NaN, or no finite maximum."""
    NONE_ALLOWED = 2
    """Masks and bans left no finite logit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """What a call drew; a list for each part, because a batch makes one of these and not one a row."""

    statuses: list[int]
    """[draws] of `DrawStatus`."""
    token_ids: list[int]
    """[draws]; meaningless unless drawn."""
    logprobs: list[TokenLogprobs | None]
    """[draws]; None unless drawn and asked for."""


class HostSampler(Protocol):
    """Steps 1 to 7 of `sampler` for all that is not rare."""

    @property
    def num_bytes(self) -> int:
        """Bytes that stay between calls."""
        ...

    def sample(
        self,
        logits: Floats,
        *,
        rows: Sequence[int],
        states: Sequence[SequenceState],
        output_idxs: Sequence[int],
        masks: Sequence[Mask | None] | None,
    ) -> Draws:
        """Choose one token per draw; changes neither logits nor states.

        Args:
            logits: [num_rows, vocab] float32, C-contiguous.
            rows: [draws], the row that each draws from; may repeat.
            states: [draws], each sequence's parameters and history.
            output_idxs: [draws], how many tokens each answer has already.
            masks: [draws], the tokens that each may draw, or None where it may draw any; None where all may.

        Raises:
            IndexError: a bias, ban or penalty names a token outside the vocabulary.
        """
        ...

    def prepare(
        self, *, states: Sequence[SequenceState], output_idxs: list[int], vocab: int
    ) -> "_native.PreparedDraws | None":
        """The same draws from logits that are yet to come: draw i from row i of what a native pass computes.

        Changes no state. Only the draws that were prepared last can be read, and once they have run.

        Args:
            states: as in `sample`; none is rare.
            output_idxs: as there.
            vocab: columns of the logits.

        Returns:
            For `DecodePass.run`; None if something may change the logits before the choice.
        """
        ...

    def prepared_draws(self) -> Draws:
        """What the draws that were prepared last have drawn."""
        ...


class DeviceSampler(Protocol):
    """The same on a device; draws that it does not serve go to the host, which the step then waits for."""

    @property
    def num_bytes(self) -> int:
        """Bytes on the device that stay between calls."""
        ...

    def serves(self, state: SequenceState, *, output_idx: int, mask: Mask | None) -> bool:
        """True if `draw` gives what numpy would for this draw."""
        ...

    def draw(
        self,
        logits: Tensor,
        *,
        rows: Sequence[int],
        states: Sequence[SequenceState],
        output_idxs: Sequence[int],
        masks: Sequence[Mask | None] | None,
    ) -> Tensor:
        """Queue the choice of one token per draw; changes neither logits nor states, waits for nothing.

        Args:
            logits: [num_rows, vocab] float32 on the device.
            rows: as in `HostSampler.sample`, the rest too; all draws are served.
            states: what is read of them is read now.
            output_idxs: as there.
            masks: as there; copied now.

        Returns:
            [draws, TOP + 2 * k] float64 on the device, k the most alternatives that any draw asks for: the
            token (in [0, vocab) whatever the status), `DrawStatus`, the token's logprob and rank, then k ids
            and k logprobs. Every number of it is exact in float64.
        """
        ...


def draws_of_table(table: Doubles, *, num_top: Sequence[int | None]) -> Draws:
    """What a `DeviceSampler` drew, once its table is on the host.

    Args:
        table: [draws, TOP + 2 * k].
        num_top: [draws], `SamplingParams.logprobs` of each.
    """
    statuses = [int(status) for status in table[:, STATUS].tolist()]
    return Draws(
        statuses=statuses,
        token_ids=[int(token) for token in table[:, TOKEN].tolist()],
        logprobs=[
            _logprobs(row, num_top=asked) if asked is not None and status == DrawStatus.DRAWN else None
            for row, asked, status in zip(table, num_top, statuses, strict=True)
        ],
    )


def _logprobs(row: Doubles, *, num_top: int) -> TokenLogprobs:
    sampled = TokenLogprob(int(row[TOKEN]), float(row[LOGPROB]), int(row[RANK]))
    ids, logprobs = row[TOP:].reshape(2, -1)[:, :num_top].tolist()
    pairs = zip(ids, logprobs, strict=True)
    return TokenLogprobs(
        sampled, tuple(TokenLogprob(int(i), lp, rank) for rank, (i, lp) in enumerate(pairs, 1))
    )
