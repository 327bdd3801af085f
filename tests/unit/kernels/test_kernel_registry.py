"""The registry chooses what can run and refuses the rest by name."""

import pytest
import torch

from penstock.core.errors import StartupError
from penstock.kernels.registry import HOMES, runnable, select_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_the_preferred_home(dtype: torch.dtype) -> None:
    assert select_kernels("auto", device="cpu", dtype=dtype).name == "eager"


@pytest.mark.parametrize("name", list(HOMES))
def test_a_home_bears_the_name_it_is_chosen_by(name: str) -> None:
    assert select_kernels(name, device="cpu", dtype=torch.float32).name == name


@pytest.mark.parametrize(
    ("name", "device", "dtype"), [("triton", "cpu", torch.float32), ("eager", "cpu", torch.float16)]
)
def test_a_home_that_cannot_run_is_refused_with_what_can(name: str, device: str, dtype: torch.dtype) -> None:
    with pytest.raises(StartupError) as caught:
        select_kernels(name, device=device, dtype=dtype)
    assert caught.value.param == "kernels"
    assert name in caught.value.message
    assert (", ".join(runnable(device=device, dtype=dtype)) or "none") in caught.value.message


def test_auto_without_any_home_for_the_device_is_refused() -> None:
    with pytest.raises(StartupError, match="auto.*what can: none"):
        select_kernels("auto", device="tpu", dtype=torch.float32)
