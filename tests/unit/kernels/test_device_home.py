"""The home that carries tensors to a device and back, tried with a device that is the host's memory again."""

import torch

from penstock.kernels import ops
from penstock.kernels.batch import KvShape
from penstock.kernels.reference.kernel_set import ReferenceKernels
from tests.unit.kernels.device_home import MovingHome


def test_what_a_kernel_writes_comes_back_and_what_it_reads_stays() -> None:
    plain = ReferenceKernels()
    carried = MovingHome(plain, "cpu")
    shape = KvShape(block_size=4, num_kv_heads=1, head_dim=2, dtype=torch.float32)
    slabs = [ops.make_slab(home, shape, num_blocks=3) for home in (plain, carried)]
    keys, values = torch.randn(2, 1, 2), torch.randn(2, 1, 2)
    for home, slab in zip((plain, carried), slabs, strict=True):
        ops.write_kv(home, keys, values, slab, torch.tensor([5, 8]))
    assert torch.equal(slabs[0].keys, slabs[1].keys)
    assert slabs[1].keys.any()
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    product = ops.linear(carried, x, ops.prepare_linear(carried, weight))
    torch.testing.assert_close(product, x @ weight.t())
