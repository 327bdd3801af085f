"""Memory goes back to the kernel or to the host, and comes again."""

import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from penstock.engine.runner.host_memory import release_pages
from penstock.engine.runner.stored_weights import StoredWeights, tensors_in
from penstock.observe.memory import resident_bytes

MIB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels have no such call")
def test_released_pages_are_zeros_and_not_resident():
    """Also at the ends, which are no whole pages."""
    memory = torch.from_numpy(np.zeros(64 * MIB + 77, dtype=np.uint8))
    part = memory[3:]
    part.fill_(7)
    before = resident_bytes()
    release_pages(part)
    assert before - resident_bytes() > 60 * MIB
    assert not part.any()
    part.fill_(5)
    assert bool((part == 5).all())


@dataclass(slots=True)
class Slotted:
    weight: torch.Tensor


class Layer:
    def __init__(self) -> None:
        self.weight = torch.arange(6.0)
        self.view = self.weight[2:4]
        self.inner = [Slotted(torch.ones(3)), {"bias": torch.full((2,), 4.0)}]
        self.itself = self


def test_every_tensor_is_found_once():
    layer = Layer()
    found = list(tensors_in(layer))
    assert len(found) == 4
    assert any(tensor is layer.inner[0].weight for tensor in found)


def test_weights_come_back_as_they_were_and_so_do_views_of_them():
    layer = Layer()
    weights = StoredWeights(layer, lies_on_device=lambda tensor: tensor.numel() > 1)
    weights.put_aside()
    assert layer.weight.untyped_storage().nbytes() == 0
    assert weights.num_bytes == 4 * (6 + 3 + 2)
    weights.bring_back()
    assert layer.weight.tolist() == list(range(6))
    assert layer.view.tolist() == [2.0, 3.0]
    layer.weight[2] = 9
    assert layer.view[0] == 9
    assert layer.inner[1]["bias"].tolist() == [4.0, 4.0]
    assert weights.num_bytes == 0
