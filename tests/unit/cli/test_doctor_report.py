"""`penstock doctor` reads what the system says and marks what is missing."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from penstock.cli import doctor
from penstock.cli.doctor import Finding
from penstock.kernels import devices
from penstock.kernels.triton import availability

CPUINFO = "processor\t: 0\nmodel name\t: Test CPU\nflags\t\t: fpu avx2 fma amx_bf16\n\nprocessor\t: 1\n"


def test_cpu_features_that_matter_are_listed() -> None:
    found = {finding.name: finding.value for finding in doctor.cpu_findings(CPUINFO)}
    assert found["CPU"] == "Test CPU"
    assert found["CPU features"] == "avx2 fma amx_bf16"


def test_memory_is_read_in_kib() -> None:
    found = doctor.memory_findings("MemTotal:  2097152 kB\nMemAvailable: 1048576 kB\nHugePages: 0\n")
    assert [finding.value for finding in found] == ["2.0 GiB", "1.0 GiB"]


def test_no_cpuinfo_is_no_crash() -> None:
    assert doctor.cpu_flags("") == frozenset()
    assert doctor.memory_findings("") == []


def test_bandwidth_is_bytes_over_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "BANDWIDTH_BYTES", 4096)
    assert doctor.measure_read_bandwidth() > 0


def test_what_is_missing_is_named_and_sets_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(
        doctor,
        "examine",
        lambda: [Finding(name="a", value="1"), Finding(name="b", value="no", is_missing=True)],
    )
    assert doctor.report(Console(file=out, width=80)) == 1
    assert "missing: b" in out.getvalue()


def test_a_whole_machine_exits_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(doctor, "examine", lambda: [Finding(name="a", value="[1]")])
    assert doctor.report(Console(file=out, width=80)) == 0
    assert "[1]" in out.getvalue()


def test_the_native_kernels_are_named_with_their_instruction_set_and_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PENSTOCK_ISA", raising=False)
    assert "the best of scalar" in doctor.native_finding().value
    monkeypatch.setenv("PENSTOCK_ISA", "scalar")
    assert "C++ on scalar (PENSTOCK_ISA asks for it)" in doctor.native_finding().value


def test_an_instruction_set_that_is_not_there_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_ISA", "mmx")
    finding = doctor.native_finding()
    assert finding.is_missing
    assert "'mmx'" in finding.value


def test_without_the_extension_module_doctor_says_why_and_what_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "penstock.kernels.cpu._native", None)
    finding = doctor.native_finding()
    assert not finding.is_missing
    assert finding.value.startswith("no: the extension module")
    assert finding.value.endswith("torch computes")


def test_without_a_device_doctor_says_why_and_that_the_cpu_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "this build of torch has no CUDA"
    monkeypatch.delenv(availability.INTERPRET_VARIABLE, raising=False)
    monkeypatch.setattr(availability, "is_interpreted", lambda: False)
    monkeypatch.setattr(devices, "why_no_cuda", lambda: missing)
    monkeypatch.setattr(devices, "why_no_triton", lambda: None)
    assert doctor.gpu_finding().value == f"none: {missing}"
    assert doctor.triton_finding().value == f"no: {missing}"
    assert doctor.auto_finding().value.startswith(f"cpu ({missing}); kernels ")


def test_a_device_without_triton_is_left_alone_and_doctor_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = "triton is not installed (pip install 'penstock[gpu]')"
    monkeypatch.setattr(devices, "why_no_cuda", lambda: None)
    monkeypatch.setattr(devices, "why_no_triton", lambda: missing)
    assert doctor.triton_finding().value == f"no: {missing}"
    assert doctor.auto_finding().value.startswith(f"cpu ({missing}); kernels ")


def test_a_device_is_named_with_its_memory_and_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "why_no_cuda", lambda: None)
    monkeypatch.setattr(devices, "why_no_triton", lambda: None)
    monkeypatch.setattr(availability, "is_interpreted", lambda: False)
    monkeypatch.setattr(availability, "why_missing", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    chip = SimpleNamespace(name="Chip", total_memory=3 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: chip)
    assert doctor.gpu_finding().value == "Chip with 3.0 GiB; torch is built for CUDA 12.8"
    assert doctor.triton_finding().value.startswith("yes: Triton ")
    assert doctor.auto_finding().value == (
        "cuda:0 (torch sees a CUDA device and triton is installed); "
        "kernels triton for bfloat16, triton for float32"
    )


def test_interpreted_kernels_are_said_to_be_for_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "why_no_triton", lambda: None)
    monkeypatch.setattr(availability, "is_interpreted", lambda: True)
    assert "under its interpreter" in doctor.triton_finding().value
