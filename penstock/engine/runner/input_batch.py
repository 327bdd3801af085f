"""From a plan's sequences to the flat tensors of one step.

It only arranges numbers: no padding, no decision, no model. The runner calls it once per forward pass.
Worked example: see `kernels/batch.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from penstock.core.ids import SequenceId
from penstock.engine.kv.cache_groups import CacheLayout
from penstock.engine.lora.slots import NO_SLOT
from penstock.engine.runner.kv_pool import KvPool, layer_groups, layer_slabs
from penstock.engine.scheduler.plan import ScheduledSequence
from penstock.kernels.adapters import AdapterRows, AdapterWeights
from penstock.kernels.batch import AttentionBatch, ForwardBatch

NO_BLOCK: Final = -1
COLUMNS_STEP: Final = 16
"""Arrays of decodes grow by so many blocks a sequence."""

Tables = list[npt.NDArray[np.int32]]
"""One array per cache group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """What all cache groups share: where each sequence's tokens lie."""

    query_lens: npt.NDArray[np.int64]
    """[num_seqs]"""
    query_start_loc: npt.NDArray[np.int64]
    """[num_seqs + 1]"""
    seq_lens: npt.NDArray[np.int64]
    """[num_seqs]"""
    positions: npt.NDArray[np.int64]
    """[num_tokens]"""
    owner: npt.NDArray[np.int64]
    """[num_tokens]: index of the sequence that each token belongs to."""


def _make_rows(sequences: Sequence[ScheduledSequence]) -> _Rows:
    num_seqs = len(sequences)
    query_lens = np.fromiter((len(seq.token_ids) for seq in sequences), np.int64, num_seqs)
    starts = np.fromiter((seq.start for seq in sequences), np.int64, num_seqs)
    query_start_loc = np.zeros(num_seqs + 1, np.int64)
    np.cumsum(query_lens, out=query_start_loc[1:])
    owner = np.repeat(np.arange(num_seqs), query_lens)
    positions = np.arange(query_start_loc[-1]) + (starts - query_start_loc[:-1])[owner]
    return _Rows(
        query_lens=query_lens,
        query_start_loc=query_start_loc,
        seq_lens=starts + query_lens,
        positions=positions,
        owner=owner,
    )


class BlockTableCache:
    """Block tables as arrays, kept from step to step: most tables are the same as in the step before.

    The scheduler hands tables by reference and goes on changing them, so a table is compared with the copy
    that its array was made from (comparing equal lists costs a few ns an entry, converting one 30 ns). Only
    the sequences of the latest step with a chunk are kept; decodes have a `DecodeTable`.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[SequenceId, int], tuple[list[int], npt.NDArray[np.int32]]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays (4 an entry) and of the copies (8 an entry)."""
        return sum(12 * len(copy) for copy, _ in self._entries.values())

    def tables(self, sequences: Sequence[ScheduledSequence], *, num_groups: int) -> list[Tables]:
        """For each group the sequences' tables as int32 arrays, which the caller must not write to."""
        kept = {}
        for seq in sequences:
            for group_idx, table in enumerate(seq.block_tables):
                entry = self._entries.get((seq.seq_id, group_idx))
                if entry is None or entry[0] != table:
                    entry = (list(table), np.array(table, dtype=np.int32))
                kept[seq.seq_id, group_idx] = entry
        self._entries = kept
        return [[kept[seq.seq_id, group_idx][1] for seq in sequences] for group_idx in range(num_groups)]


class InputBatchBuilder:
    """Builds `ForwardBatch`es over one KV pool; keeps nothing but block tables and the arrays of decodes."""

    def __init__(self, layout: CacheLayout, *, pool: KvPool) -> None:
        self._num_groups = len(layout.groups)
        self._block_size = pool.block_size
        self._layer_groups = layer_groups(layout)
        self._layer_slabs = layer_slabs(layout, slabs=pool.slabs)
        self._tables = BlockTableCache()
        self._decodes: DecodeArrays | None = None

    @property
    def buffer_bytes(self) -> int:
        """Bytes that stay allocated between steps."""
        return self._tables.num_bytes + (self._decodes.num_bytes if self._decodes else 0)

    def build(
        self, sequences: Sequence[ScheduledSequence], *, adapters: Sequence[AdapterWeights | None] = ()
    ) -> ForwardBatch:
        """Arrange one step's inputs.

        Nothing in the result refers to the plan's lists; the next call may write over it.

        Args:
            sequences: at least one, each with at least one token and a table per cache group that covers
                every position up to its last token.
            adapters: what the slots hold.

        Returns:
            The batch; its rows are in the order of `sequences`.
        """
        if all(len(seq.token_ids) == 1 for seq in sequences):
            return self._build_decodes(sequences, adapters=adapters)
        rows = _make_rows(sequences)
        num_tokens = len(rows.positions)
        token_ids = np.fromiter(chain.from_iterable(seq.token_ids for seq in sequences), np.int64, num_tokens)
        tables = self._tables.tables(sequences, num_groups=self._num_groups)
        return ForwardBatch(
            token_ids=torch.from_numpy(token_ids),
            positions=torch.from_numpy(rows.positions),
            groups=tuple(_attention_batch(group, rows=rows, block_size=self._block_size) for group in tables),
            layer_groups=self._layer_groups,
            layer_slabs=self._layer_slabs,
            adapters=adapter_rows(sequences, adapters=adapters),
        )

    def _build_decodes(
        self, sequences: Sequence[ScheduledSequence], *, adapters: Sequence[AdapterWeights | None]
    ) -> ForwardBatch:
        """The same for one token each, in arrays that are kept: few calls of numpy and none of torch.

        After a pass over the weights no cache holds the code of a library's many small operations, and each
        costs some tens of microseconds; a decode step of one sequence is where that counts. The pass before
        has read its batch when the next is built.
        """
        decodes = self.fill_decodes(sequences)
        seq_lens = tuple(seq.start + 1 for seq in sequences)
        token_ids, positions, query_start_loc, seq_lens_tensor, *slot_mappings = decodes.tensors
        return ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            groups=tuple(
                AttentionBatch(
                    query_start_loc=query_start_loc,
                    seq_lens=seq_lens_tensor,
                    block_tables=table.tensor,
                    slot_mapping=slot_mapping,
                    query_lens_host=decodes.query_lens,
                    seq_lens_host=seq_lens,
                )
                for table, slot_mapping in zip(decodes.tables, slot_mappings, strict=True)
            ),
            layer_groups=self._layer_groups,
            layer_slabs=self._layer_slabs,
            adapters=adapter_rows(sequences, adapters=adapters),
        )

    def fill_decodes(self, sequences: Sequence[ScheduledSequence]) -> "DecodeArrays":
        """The numbers of sequences with one token each; the same object while their shape is the same.

        The tensors of the batch that `build` makes lie over these arrays: while the object is the same, a
        batch made before holds the new numbers, but for `seq_lens_host` and the adapters.
        """
        starts = [seq.start for seq in sequences]
        num_blocks = [start // self._block_size + 1 for start in starts]
        shape = (len(starts), -(-max(num_blocks) // COLUMNS_STEP) * COLUMNS_STEP)
        decodes = self._decodes
        if decodes is None or decodes.shape != shape:
            decodes = self._decodes = DecodeArrays(shape, num_groups=self._num_groups)
        decodes.token_ids[:] = [seq.token_ids[0] for seq in sequences]
        decodes.positions[:] = starts
        decodes.seq_lens[:] = [start + 1 for start in starts]
        for group_idx, table in enumerate(decodes.tables):
            rows = [seq.block_tables[group_idx] for seq in sequences]
            decodes.slots[group_idx][:] = _decode_slots(rows, starts, self._block_size)
            table.write(rows, num_blocks=num_blocks)
        return decodes


def adapter_rows(
    sequences: Sequence[ScheduledSequence], *, adapters: Sequence[AdapterWeights | None]
) -> tuple[AdapterRows, ...]:
    """Runs of rows by adapter; neighbours that have the same one are one run.

    Example: sequences of 3, 1 and 2 tokens in the slots -1, 5 and 5 give one run, rows 3 to 5.
    """
    if not adapters:
        return ()
    runs: list[AdapterRows] = []
    row, last_slot = 0, NO_SLOT
    for seq in sequences:
        num_rows = len(seq.token_ids)
        if seq.adapter_slot != NO_SLOT:
            weights = adapters[seq.adapter_slot]
            assert weights is not None, "a sequence uses a slot that holds nothing"
            first = runs.pop().first_row if seq.adapter_slot == last_slot else row
            runs.append(AdapterRows(first_row=first, num_rows=row + num_rows - first, weights=weights))
        row, last_slot = row + num_rows, seq.adapter_slot
    return tuple(runs)


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


def _decode_slots(tables: Sequence[list[int]], starts: Sequence[int], block_size: int) -> list[int]:
    slots = []
    for table, start in zip(tables, starts, strict=True):
        block_id = table[start // block_size]
        assert block_id >= 0, "a token is written to a block that its sequence does not own"
        slots.append(block_id * block_size + start % block_size)
    return slots


def _attention_batch(tables: Tables, *, rows: _Rows, block_size: int) -> AttentionBatch:
    block_tables = _stack_tables(tables, seq_lens=rows.seq_lens, block_size=block_size)
    block_ids = block_tables[rows.owner, rows.positions // block_size]
    assert block_ids.min() >= 0, "a token is written to a block that its sequence does not own"
    slot_mapping = block_ids.astype(np.int64) * block_size + rows.positions % block_size
    return AttentionBatch(
        query_start_loc=torch.from_numpy(rows.query_start_loc.astype(np.int32)),
        seq_lens=torch.from_numpy(rows.seq_lens.astype(np.int32)),
        block_tables=torch.from_numpy(block_tables),
        slot_mapping=torch.from_numpy(slot_mapping),
        query_lens_host=tuple(rows.query_lens.tolist()),
        seq_lens_host=tuple(rows.seq_lens.tolist()),
    )


def _stack_tables(
    tables: Tables, *, seq_lens: npt.NDArray[np.int64], block_size: int
) -> npt.NDArray[np.int32]:
    """[num_seqs, max_num_blocks]: entries beyond a sequence's last token are `NO_BLOCK`."""
    num_blocks = (-(-seq_lens // block_size)).tolist()
    stacked = np.full((len(tables), max(num_blocks)), NO_BLOCK, np.int32)
    for row, table, num in zip(stacked, tables, num_blocks, strict=True):
        row[:num] = table[:num]
    return stacked
