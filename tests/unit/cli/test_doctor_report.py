"""`penstock doctor` reads what the system says and marks what is missing."""

import io

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
