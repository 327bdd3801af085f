"""The registry chooses what can run and refuses the rest by name."""

import sys
from dataclasses import replace

import pytest
import torch

from penstock.core.errors import StartupError
from penstock.kernels.options import DEFAULT_OPTIONS, KernelOptions
from penstock.kernels.registry import HOMES, runnable, select_kernels
from penstock.kernels.triton import availability


@pytest.mark.parametrize(
    ("dtype", "options", "name"),
    [
        (torch.float32, DEFAULT_OPTIONS, "eager"),
        (torch.bfloat16, DEFAULT_OPTIONS, "native"),
        (torch.bfloat16, KernelOptions(block_size=4), "eager"),
        (torch.float32, KernelOptions(is_deterministic=True), "reference"),
        (torch.bfloat16, KernelOptions(is_deterministic=True), "native"),
        (torch.bfloat16, KernelOptions(kv_cache_dtype="int8"), "native"),
        (torch.float32, KernelOptions(kv_cache_dtype="int8"), "reference"),
        (torch.bfloat16, KernelOptions(kv_cache_dtype="fp8"), "reference"),
    ],
)
def test_auto_takes_the_preferred_home_of_those_that_serve_the_options(
    dtype: torch.dtype, options: KernelOptions, name: str
) -> None:
    assert select_kernels("auto", device="cpu", dtype=dtype, options=options).name == name


@pytest.mark.parametrize("name", list(HOMES))
def test_a_home_bears_the_name_it_is_chosen_by(name: str) -> None:
    assert select_kernels(name, device="cpu", dtype=torch.bfloat16).name == name


@pytest.mark.parametrize(
    ("name", "dtype", "options", "words"),
    [
        ("native", torch.float32, DEFAULT_OPTIONS, "float32"),
        ("native", torch.bfloat16, KernelOptions(block_size=8), "block_size"),
        ("eager", torch.bfloat16, KernelOptions(is_deterministic=True), "not deterministic"),
        ("eager", torch.bfloat16, KernelOptions(kv_cache_dtype="int8"), "kv_cache_dtype int8"),
        ("eager", torch.float32, KernelOptions(kv_cache_dtype="fp8"), "kv_cache_dtype fp8"),
        ("native", torch.bfloat16, KernelOptions(kv_cache_dtype="fp8"), "kv_cache_dtype fp8"),
        ("eager", torch.float32, KernelOptions(kv_cache_dtype="bfloat16"), "kv_cache_dtype bfloat16"),
        (
            "auto",
            torch.float32,
            KernelOptions(kv_cache_dtype="bfloat16"),
            "native: it does not compute in float32",
        ),
    ],
)
def test_what_a_home_does_not_serve_is_refused_with_the_reason(
    name: str, dtype: torch.dtype, options: KernelOptions, words: str
) -> None:
    with pytest.raises(StartupError, match=words):
        select_kernels(name, device="cpu", dtype=dtype, options=options)


def test_the_triton_home_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package, a device, or the interpreter that stands in for one."""
    home = HOMES["triton"]
    assert (
        home.why_not(device="cpu", dtype=torch.bfloat16, options=DEFAULT_OPTIONS) is None
    )  # interpreted here
    plain = replace(home, devices=availability.usable_devices({}))
    reason = plain.why_not(device="cpu", dtype=torch.bfloat16, options=DEFAULT_OPTIONS)
    assert reason == "it does not run on cpu"
    if not torch.cuda.is_available():
        with pytest.raises(StartupError, match="triton: there is no CUDA device"):
            select_kernels("triton", device="cuda", dtype=torch.bfloat16)
    monkeypatch.setattr(availability.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(StartupError, match="triton: triton is not installed"):
        select_kernels("triton", device="cpu", dtype=torch.bfloat16)


def test_an_instruction_set_that_is_not_there_is_refused_with_what_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PENSTOCK_ISA", "neon")
    with pytest.raises(StartupError, match="PENSTOCK_ISA is 'neon': .*scalar, avx2") as caught:
        select_kernels("auto", device="cpu", dtype=torch.bfloat16)
    assert caught.value.param == "isa"


def test_without_the_extension_module_torch_computes_and_one_line_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "penstock.kernels.cpu._native", None)
    with caplog.at_level("WARNING"):
        assert select_kernels("auto", device="cpu", dtype=torch.bfloat16).name == "eager"
    (record,) = caplog.records
    assert "the native kernels are not used, torch computes: the extension module" in record.message
    with pytest.raises(StartupError, match="native: the extension module"):
        select_kernels("native", device="cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "device", "dtype"), [("metal", "cpu", torch.float32), ("eager", "cpu", torch.float16)]
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


def test_cpus_that_are_not_there_are_refused_with_those_that_are() -> None:
    options = KernelOptions(cpus=(4095,))
    with pytest.raises(StartupError, match="thread_affinity names CPU 4095, this process may use"):
        select_kernels("native", device="cpu", dtype=torch.bfloat16, options=options)
    with pytest.raises(StartupError, match="thread_affinity pins the threads of the native kernels alone"):
        select_kernels("eager", device="cpu", dtype=torch.bfloat16, options=options)
