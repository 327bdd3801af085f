"""Drives a model by hand over a paged cache: the least that an engine does, without one.

Blocks are handed out in a shuffled order. Blocks that no sequence owns hold NaN, and those behind a
window are -1 in the table: whoever reads them shows it.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.engine.kv.cache_groups import make_cache_layout
from penstock.kernels import ops
from penstock.kernels.adapters import AdapterRows, AdapterWeights
from penstock.kernels.batch import AttentionBatch, ForwardBatch, KvSlab
from penstock.models.interface import LoadedModel

NUM_BLOCKS = 200


class PagedDriver:
    """Sequences by name, each with its tokens so far and its block tables."""

    def __init__(self, loaded: LoadedModel, *, block_size: int = 4, seed: int = 0) -> None:
        self.model, self.block_size = loaded.model, block_size
        self.layout = make_cache_layout(self.model.layer_windows)
        shape = loaded.kv_shape(block_size=block_size)
        self.slabs = [
            ops.make_slab(loaded.kernels, shape, num_blocks=NUM_BLOCKS) for _ in range(self.layout.num_slabs)
        ]
        self.layers: tuple[KvSlab, ...] = ()
        for slab in self.slabs:  # all bits set: NaN in every dtype and layout
            for cache in (slab.keys, slab.values):
                cache.view(torch.uint8).fill_(255)
        self.free = list(range(NUM_BLOCKS))
        random.Random(seed).shuffle(self.free)
        self.tables: dict[str, list[list[int]]] = {}
        self.lengths: dict[str, int] = {}
        self.adapters: dict[str, AdapterWeights] = {}
        """Of the sequences that use one."""

    def _grow(self, name: str, length: int) -> None:
        for table in self.tables.setdefault(name, [[] for _ in self.layout.groups]):
            while len(table) * self.block_size < length:
                table.append(self.free.pop())
                for slab in self.slabs:
                    slab.keys[table[-1]] = slab.values[table[-1]] = 0

    def _visible(self, table: list[int], start: int, window: int | None) -> list[int]:
        first = 0 if window is None else max(0, start - window + 1) // self.block_size
        return [-1] * first + table[first:]

    def _group_batch(self, group: int, rows: Sequence[tuple[str, int, int]]) -> AttentionBatch:
        window = self.layout.groups[group].window
        tables = [self._visible(self.tables[name][group], start, window) for name, start, _ in rows]
        width = max(len(table) for table in tables)
        query_lens = tuple(end - start for _, start, end in rows)
        slots = [
            self.tables[name][group][position // self.block_size] * self.block_size
            + position % self.block_size
            for name, start, end in rows
            for position in range(start, end)
        ]
        ends = tuple(end for _, _, end in rows)
        return AttentionBatch(
            query_start_loc=torch.tensor([0, *query_lens]).cumsum(0).int(),
            seq_lens=torch.tensor(ends, dtype=torch.int32),
            block_tables=torch.tensor(
                [table + [-1] * (width - len(table)) for table in tables], dtype=torch.int32
            ),
            slot_mapping=torch.tensor(slots),
            query_lens_host=query_lens,
            seq_lens_host=ends,
        )

    def _batch(self, step: Sequence[tuple[str, Sequence[int]]]) -> ForwardBatch:
        rows = []
        for name, tokens in step:
            start = self.lengths.get(name, 0)
            self.lengths[name] = start + len(tokens)
            self._grow(name, self.lengths[name])
            rows.append((name, start, self.lengths[name]))
        groups = self.layout.groups
        by_layer = {
            layer: (g, slab) for g, group in enumerate(groups) for slab, layer in enumerate(group.layers)
        }
        places = [by_layer[layer] for layer in range(len(by_layer))]
        self.layers = self.layers or tuple(self.slabs[slab] for _, slab in places)
        return ForwardBatch(
            token_ids=torch.tensor([token for _, tokens in step for token in tokens]),
            positions=torch.tensor([p for _, start, end in rows for p in range(start, end)]),
            groups=tuple(self._group_batch(g, rows) for g in range(len(groups))),
            layer_groups=tuple(group for group, _ in places),
            layer_slabs=self.layers,
            adapters=self._adapter_rows(step),
        )

    def _adapter_rows(self, step: Sequence[tuple[str, Sequence[int]]]) -> tuple[AdapterRows, ...]:
        runs, row = [], 0
        for name, tokens in step:
            if name in self.adapters:
                weights = self.adapters[name]
                runs.append(AdapterRows(first_row=row, num_rows=len(tokens), weights=weights))
            row += len(tokens)
        return tuple(runs)

    def step(self, chunks: Sequence[tuple[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Compute one step.

        Args:
            chunks: name and next tokens of each sequence in the step.

        Returns:
            For each name the logits [tokens, vocab_size] of its tokens.
        """
        with torch.inference_mode():
            logits = self.model.logits(self.model.forward(self._batch(chunks)))
        parts = logits.split([len(tokens) for _, tokens in chunks])
        return {name: part for (name, _), part in zip(chunks, parts, strict=True)}


def run_schedule(
    driver: PagedDriver, sequences: dict[str, list[int]], schedule: Sequence[dict[str, int]]
) -> dict[str, Tensor]:
    """Feed sequences in the given chunk sizes.

    Args:
        driver: with no sequence of these names yet.
        sequences: all tokens of each.
        schedule: for each step how many tokens of which sequence.

    Returns:
        For each sequence the logits of all tokens that were fed, [tokens, vocab_size].
    """
    done = dict.fromkeys(sequences, 0)
    parts: dict[str, list[Tensor]] = {name: [] for name in sequences}
    for sizes in schedule:
        chunks = [(name, sequences[name][done[name] : done[name] + size]) for name, size in sizes.items()]
        for name, logits in driver.step(chunks).items():
            parts[name].append(logits)
            done[name] += len(logits)
    assert all(done[name] == len(tokens) for name, tokens in sequences.items()), done
    return {name: torch.cat(part) for name, part in parts.items()}
