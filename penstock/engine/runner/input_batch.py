"""From a plan's sequences to the flat tensors of one step.

It only arranges numbers: no padding, no decision, no model. The runner calls it once per forward pass.
Worked example: see `kernels/batch.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from penstock.core.ids import SequenceId
from penstock.engine.kv.cache_groups import CacheLayout
from penstock.engine.runner.bound_adapters import adapter_rows
from penstock.engine.runner.decode_arrays import NO_BLOCK, DecodeArrays, shape_of
from penstock.engine.runner.kv_pool import KvPool, layer_groups, layer_slabs
from penstock.engine.scheduler.plan import ScheduledSequence
from penstock.kernels.adapters import AdapterWeights
from penstock.kernels.batch import AttentionBatch, ForwardBatch

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

    def fill_decodes(self, sequences: Sequence[ScheduledSequence]) -> DecodeArrays:
        """The numbers of sequences with one token each; the same object while their shape is the same.

        The tensors of the batch that `build` makes lie over these arrays: while the object is the same, a
        batch made before holds the new numbers, but for `seq_lens_host` and the adapters.
        """
        shape = shape_of(sequences, block_size=self._block_size)
        decodes = self._decodes
        if decodes is None or decodes.shape != shape:
            decodes = self._decodes = DecodeArrays(shape, num_groups=self._num_groups)
        decodes.fill(sequences, block_size=self._block_size)
        return decodes


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
