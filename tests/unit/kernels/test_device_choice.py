"""`--device`: what auto takes, and what a refusal names."""

import pytest
import torch

from penstock.core.errors import StartupError
from penstock.kernels import devices
from penstock.kernels.devices import CPU, choose_device


@pytest.fixture
def cuda_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "why_no_cuda", lambda: None)
    monkeypatch.setattr(devices, "why_no_triton", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_auto_without_cuda_takes_the_cpu_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "torch sees no CUDA device")
    chosen = choose_device("auto")
    assert (chosen.device, chosen.reason) == (CPU, "torch sees no CUDA device")


@pytest.mark.usefixtures("cuda_is_there")
def test_auto_with_cuda_and_triton_takes_the_ranks_device() -> None:
    assert choose_device("auto", index=1).device == torch.device("cuda", 1)
    assert choose_device("cuda", kernels="triton").device == torch.device("cuda", 0)


@pytest.mark.usefixtures("cuda_is_there")
def test_kernels_of_the_cpu_make_auto_take_it_and_refuse_cuda() -> None:
    assert choose_device("auto", kernels="reference").device == CPU
    with pytest.raises(StartupError, match="kernels native run on the CPU alone .on CUDA: triton.; --device"):
        choose_device("cuda", kernels="native")


@pytest.mark.usefixtures("cuda_is_there")
@pytest.mark.parametrize(
    ("missing", "why"),
    [("why_no_cuda", "torch sees no CUDA device"), ("why_no_triton", "triton is not installed")],
)
def test_cuda_is_refused_by_what_is_missing_and_what_runs_instead(
    monkeypatch: pytest.MonkeyPatch, missing: str, why: str
) -> None:
    monkeypatch.setattr(devices, missing, lambda: why)
    with pytest.raises(StartupError, match=f"device is 'cuda': {why}; --device cpu runs here") as caught:
        choose_device("cuda")
    assert caught.value.param == "device"


@pytest.mark.usefixtures("cuda_is_there")
def test_a_device_that_torch_does_not_see_is_refused() -> None:
    with pytest.raises(StartupError, match="CUDA device 2 is asked for, torch sees 2"):
        choose_device("cuda", index=2)


def test_the_cpu_needs_nothing() -> None:
    assert choose_device("cpu", kernels="triton").device == CPU
