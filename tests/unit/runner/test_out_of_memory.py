"""What counts as out of memory."""

import numpy as np
import pytest
import torch

from penstock.engine.runner.out_of_memory import is_out_of_memory


def test_real_allocators_that_fail_are_recognised():
    too_many = 1 << 60
    with pytest.raises(RuntimeError) as from_torch:
        torch.empty(too_many, dtype=torch.uint8)
    with pytest.raises(MemoryError) as from_numpy:
        np.ones(1 << 58)
    assert is_out_of_memory(from_torch.value)
    assert is_out_of_memory(from_numpy.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))


def test_other_faults_are_not():
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))
