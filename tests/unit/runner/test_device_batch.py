"""A step's inputs in one transfer: the same numbers, whole and aligned, and nothing of the step before."""

import torch

from penstock.engine.kv.cache_groups import make_cache_layout
from penstock.engine.runner.device_batch import on_device, tensors_of
from penstock.engine.runner.input_batch import InputBatchBuilder
from penstock.engine.runner.kv_pool import KvPool
from penstock.engine.scheduler.plan import ScheduledSequence
from penstock.kernels.batch import KvBlock, KvShape
from penstock.kernels.devices import CPU
from penstock.kernels.transfer import ALIGNMENT, indices, on_host, upload


def test_tensors_of_all_kinds_arrive_in_one_buffer_each_at_an_aligned_place() -> None:
    given = [torch.arange(3), torch.ones(2, 5, dtype=torch.int32), torch.empty(0, dtype=torch.int64)]
    arrived = upload([*given, torch.tensor([1.5])], device=CPU)
    for before, after in zip(given, arrived, strict=False):
        assert after.dtype == before.dtype
        assert torch.equal(before, after)
        assert after.storage_offset() * after.itemsize % ALIGNMENT == 0
    assert len({after.untyped_storage().data_ptr() for after in arrived}) == 1


def test_a_step_on_the_device_has_the_numbers_of_the_step_on_the_host() -> None:
    layout = make_cache_layout((None, 4))
    shape = KvShape(block_size=4, num_kv_heads=1, head_dim=2, dtype=torch.float32)
    pool = KvPool(layout, num_blocks=8, shape=shape, block=KvBlock(shape=(4, 1, 2), dtype=torch.float32))
    builder = InputBatchBuilder(layout, pool=pool)
    chunk = ScheduledSequence(0, [5, 6, 7], 3, ([1, 2], [3, 4]))
    decode = ScheduledSequence(1, [9], 0, ([5], [6]))
    for sequences in ([chunk, decode], [decode]):
        batch = builder.build(sequences)
        moved = on_device(batch, device=CPU)
        assert all(map(torch.equal, tensors_of(batch), tensors_of(moved)))
        assert moved.layer_slabs is batch.layer_slabs
        kept = [tensor.clone() for tensor in tensors_of(moved)]
        builder.build([ScheduledSequence(1, [3], 1, ([5], [6]))])  # writes over the builder's own arrays
        assert all(map(torch.equal, kept, tensors_of(moved)))


def test_numbers_come_back_as_float32_in_one_piece() -> None:
    values = on_host(torch.arange(6, dtype=torch.bfloat16).view(2, 3).t())
    assert values.dtype == "float32"
    assert values.flags.c_contiguous
    assert values.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert indices([3, 1], device=CPU).tolist() == [3, 1]
