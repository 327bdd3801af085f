"""A step's inputs on the device: built in plain arrays as on the CPU, then moved in one transfer.

Tokens that the host does not know yet, because the step before is drawing them, are put in place on the
device, out of the tensor in which that step's draws lie.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from penstock.core.ids import SequenceId
from penstock.engine.scheduler.plan import PENDING_TOKEN, ScheduledSequence
from penstock.kernels.batch import AttentionBatch, ForwardBatch
from penstock.kernels.transfer import upload


def tensors_of(batch: ForwardBatch) -> list[Tensor]:
    """The tensors that differ from step to step; `with_tensors` takes them in this order."""
    found = [batch.token_ids, batch.positions]
    for group in batch.groups:
        found += [group.query_start_loc, group.seq_lens, group.block_tables, group.slot_mapping]
    return found


def with_tensors(batch: ForwardBatch, tensors: Sequence[Tensor]) -> ForwardBatch:
    """The same step over other tensors; what kernels had worked out for the old ones is dropped."""
    token_ids, positions, *rest = tensors
    parts = zip(batch.groups, range(0, len(rest), 4), strict=True)
    groups = tuple(_group(group, rest[first : first + 4]) for group, first in parts)
    return replace(batch, token_ids=token_ids, positions=positions, groups=groups)


def _group(group: AttentionBatch, tensors: Sequence[Tensor]) -> AttentionBatch:
    query_start_loc, seq_lens, block_tables, slot_mapping = tensors
    return AttentionBatch(
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_tables=block_tables,
        slot_mapping=slot_mapping,
        query_lens_host=group.query_lens_host,
        seq_lens_host=group.seq_lens_host,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LastDrawn:
    """What the latest step drew, where it lies."""

    rows: dict[SequenceId, int] = field(default_factory=dict)
    """By sequence: its row in `tokens`."""
    tokens: Tensor | None = None
    """[draws] int64 on the device; None if nothing was drawn there."""

    def sources(self, sequences: Sequence[ScheduledSequence]) -> tuple[list[int], list[int]]:
        """Rows of the step whose token is not known on the host, and for each its row in `tokens`."""
        targets, origins, row = [], [], 0
        for seq in sequences:
            if seq.token_ids[0] == PENDING_TOKEN:
                targets.append(row)
                origins.append(self.rows[seq.seq_id])
            row += len(seq.token_ids)
        return targets, origins


def on_device(
    batch: ForwardBatch,
    *,
    device: torch.device,
    sequences: Sequence[ScheduledSequence] = (),
    last: LastDrawn | None = None,
) -> ForwardBatch:
    """The step's inputs on the device; its slabs and adapters are there already.

    Args:
        batch: on the host.
        device: where to.
        sequences: what it was built from, where some token may be `PENDING_TOKEN`.
        last: where those tokens lie.
    """
    targets, origins = ([], []) if last is None else last.sources(sequences)
    tensors = tensors_of(batch)
    places = [torch.tensor(targets), torch.tensor(origins)] if targets else []
    arrived = upload([*tensors, *places], device=device)
    moved = with_tensors(batch, arrived[: len(tensors)])
    if last is not None and last.tokens is not None and targets:
        rows, drawn = arrived[len(tensors) :]
        moved.token_ids.index_copy_(0, rows, last.tokens.index_select(0, drawn))
    return moved
