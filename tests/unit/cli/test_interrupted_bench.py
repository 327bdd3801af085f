"""Ctrl-C in a measurement keeps what was measured until then, and exit code 130 says so."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from penstock.cli import bench_engine
from penstock.cli.bench_options import until_interrupted
from penstock.cli.main import main


def _interrupted(*rows: str) -> Iterator[str]:
    yield from rows
    raise KeyboardInterrupt


def test_rows_until_the_interrupt_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    kept: list[list[str]] = []
    rows, code = until_interrupted(_interrupted("a", "b"), keep=lambda rows: kept.append(list(rows)))
    assert (rows, code) == (["a", "b"], 130)
    assert kept == [["a"], ["a", "b"]]
    assert "stopped" in capsys.readouterr().err


def test_a_whole_measurement_is_exit_code_0() -> None:
    assert until_interrupted(["a"], keep=lambda _: None) == (["a"], 0)


def test_ctrl_c_between_two_kernels_leaves_a_table_and_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, num_left = bench_engine.measure, 1

    def interrupted(*args, **options):  # type: ignore[no-untyped-def]  # as measure
        nonlocal num_left
        if not num_left:
            raise KeyboardInterrupt
        num_left -= 1
        return measure(*args, **options)

    monkeypatch.setattr(bench_engine, "measure", interrupted)
    output = tmp_path / "kernels.json"
    argv = ["bench", "kernels", "--shapes=tiny", "--rows=1", "--seconds=0.001", f"--output={output}"]
    assert main([*argv, "--kernels=reference", "--num-threads=1"]) == 130
    found = msgspec.json.decode(output.read_bytes())
    assert len(found["shapes"]["tiny"]) == 1
    assert "tiny, kernels reference" in capsys.readouterr().out
