"""`penstock doctor` reads what the system says and marks what is missing."""

import io
import sys

import pytest
from rich.console import Console

from penstock.cli import doctor
from penstock.cli.doctor import Finding

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
