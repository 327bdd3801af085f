"""The numbers of a step of decodes, one token a sequence, in arrays that are kept from step to step.

`input_batch` fills them; the tensors of its batches, and of `decode_steps`, lie over the same memory.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from penstock.engine.scheduler.plan import ScheduledSequence

NO_BLOCK: Final = -1
COLUMNS_STEP: Final = 16
"""Arrays grow by so many blocks a sequence."""


class DecodeTable:
    """The block tables of one cache group in a step of decodes, kept from step to step.

    A row is written only if the sequence in its place has other blocks than the one in the step before, which
    in most steps few have. The scheduler goes on changing the tables that it hands out, so they are compared
    with copies.
    """

    def __init__(self, num_seqs: int, num_columns: int) -> None:
        self._array = np.full((num_seqs, num_columns), NO_BLOCK, np.int32)
        self._written: list[list[int]] = [[] for _ in range(num_seqs)]
        self.tensor = torch.from_numpy(self._array)
        """[num_seqs, num_columns]: entries beyond a sequence's last token are `NO_BLOCK`."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the array, and of the copies (8 an entry)."""
        return self._array.nbytes + sum(8 * len(row) for row in self._written)

    def write(self, tables: Sequence[list[int]], *, num_blocks: Sequence[int]) -> None:
        """Hold the first `num_blocks` entries of each table."""
        for row, (table, num) in enumerate(zip(tables, num_blocks, strict=True)):
            used = table[:num]
            if used != self._written[row]:
                self._written[row] = used
                self._array[row, :num] = used
                self._array[row, num:] = NO_BLOCK


class DecodeArrays:
    """The numbers of a step of decodes, with tensors over the same memory."""

    def __init__(self, shape: tuple[int, int], *, num_groups: int) -> None:
        """Make them for a number of sequences, and of columns of their block tables."""
        self.shape = shape
        num_seqs, num_columns = shape
        self.token_ids = np.zeros(num_seqs, np.int64)
        self.positions = np.zeros(num_seqs, np.int64)
        self.query_start_loc = np.arange(num_seqs + 1, dtype=np.int32)
        self.seq_lens = np.zeros(num_seqs, np.int32)
        self.slots = [np.zeros(num_seqs, np.int64) for _ in range(num_groups)]
        self.query_lens = (1,) * num_seqs
        arrays = (self.token_ids, self.positions, self.query_start_loc, self.seq_lens, *self.slots)
        self.tensors = [torch.from_numpy(array) for array in arrays]
        self.tables = [DecodeTable(num_seqs, num_columns) for _ in range(num_groups)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all."""
        tensors = sum(each.nbytes for each in self.tensors)
        return tensors + sum(table.num_bytes for table in self.tables)

    def fill(self, sequences: Sequence[ScheduledSequence], *, block_size: int) -> None:
        """Write the numbers of a step whose `shape_of` is this one."""
        starts = [seq.start for seq in sequences]
        num_blocks = [start // block_size + 1 for start in starts]
        self.token_ids[:] = [seq.token_ids[0] for seq in sequences]
        self.positions[:] = starts
        self.seq_lens[:] = [start + 1 for start in starts]
        for group_idx, table in enumerate(self.tables):
            rows = [seq.block_tables[group_idx] for seq in sequences]
            self.slots[group_idx][:] = _slots(rows, starts, block_size)
            table.write(rows, num_blocks=num_blocks)


def shape_of(sequences: Sequence[ScheduledSequence], *, block_size: int) -> tuple[int, int]:
    """Sequences, and columns of block tables that hold all of them."""
    num_blocks = max(seq.start for seq in sequences) // block_size + 1
    return len(sequences), -(-num_blocks // COLUMNS_STEP) * COLUMNS_STEP


def _slots(tables: Sequence[list[int]], starts: Sequence[int], block_size: int) -> list[int]:
    slots = []
    for table, start in zip(tables, starts, strict=True):
        block_id = table[start // block_size]
        assert block_id >= 0, "a token is written to a block that its sequence does not own"
        slots.append(block_id * block_size + start % block_size)
    return slots
