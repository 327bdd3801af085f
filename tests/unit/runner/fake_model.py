"""A tiny model whose logits are a readable function of the KV it wrote: what runner tests run on.

Token t at position p writes keys t + 1 and values p + 1. The hidden state of a token is [token, position,
sum of the keys of all tokens up to it (read back from the pool), 1]. Its logits favour token
`(sum of keys) % vocab`.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from penstock.engine.kv.cache_groups import make_cache_layout
from penstock.engine.runner.runner import Runner
from penstock.kernels.batch import KvShape
from penstock.kernels.devices import CPU
from penstock.kernels.reference.kernel_set import ReferenceKernels
from tests.unit.runner.greedy_sampler import GreedySampler

VOCAB = 16


class FakeModel:
    """Follows `models/interface.CausalLM`; `num_kv_heads` 1, `head_dim` 2."""

    num_kv_heads = 1
    head_dim = 2
    vocab_size = VOCAB

    def __init__(self, layer_windows=(None,)):
        self.layer_windows = tuple(layer_windows)
        self.batches = []

    def forward(self, batch):
        self.batches.append(batch)
        for layer in range(len(self.layer_windows)):
            attention, slab = batch.attention(layer)
            block_size = slab.shape.block_size
            places = (attention.slot_mapping // block_size, attention.slot_mapping % block_size)
            slab.keys[places] = (batch.token_ids + 1).float()[:, None, None].expand(-1, 1, 2)
            slab.values[places] = (batch.positions + 1).float()[:, None, None].expand(-1, 1, 2)
        rows = []
        attention, slab = batch.attention(0)
        for i, num_tokens in enumerate(attention.query_lens_host):
            length = int(attention.seq_lens[i])
            blocks = attention.block_tables[i].long()
            sums = slab.keys[blocks][:, :, 0, 0].reshape(-1)[:length].cumsum(0)
            rows.append(sums[length - num_tokens :])
        ones = torch.ones(len(batch.token_ids))
        return torch.stack([batch.token_ids.float(), batch.positions.float(), torch.cat(rows), ones], dim=1)

    def logits(self, hidden):
        favourite = hidden[:, 2].long() % VOCAB
        ids = torch.arange(VOCAB)
        return 4.0 * (ids == favourite[:, None]).float() - 0.01 * ids


@dataclass
class FakeLoaded:
    """As much of `models/interface.LoadedModel` as the runner reads."""

    model: FakeModel
    dtype: torch.dtype = torch.float32
    kernels: ReferenceKernels = field(default_factory=ReferenceKernels)
    device: torch.device = CPU

    is_queued_by_default: ClassVar[bool] = False

    @property
    def is_queued(self):
        return self.is_queued_by_default

    def kv_shape(self, *, block_size):
        return KvShape(
            block_size=block_size,
            num_kv_heads=self.model.num_kv_heads,
            head_dim=self.model.head_dim,
            dtype=self.dtype,
        )

    def buffer_bytes(self):
        return 0


def make_runner(
    *, layer_windows=(None,), num_blocks=64, block_size=4, faults=None, make_graphs=None, adapters=None
):
    model = FakeModel(layer_windows)
    make = None if make_graphs is None else lambda pool: make_graphs(model, pool)
    loaded = FakeLoaded(model)
    runner = Runner(
        loaded,
        layout=make_cache_layout(layer_windows),
        num_blocks=num_blocks,
        block_size=block_size,
        device_sampler=GreedySampler() if loaded.is_queued else None,
        faults=faults,
        make_graphs=make,
        num_adapter_slots=len(adapters or ()),
        adapter_weights=None if adapters is None else adapters.__getitem__,
    )
    return runner, model
