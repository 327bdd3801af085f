"""Triton's compiler takes the kernels, which tests otherwise only interpret."""

import os
import subprocess
import sys

import pytest

from tools import compile_kernels
from tools.kernel_cases import PARTS

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def compiled(*args: str) -> str:
    """What the tool prints, in a process that interprets nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.compile_kernels", "--frontend", *args],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_part_is_accepted_by_the_compiler() -> None:
    """For a device that is not there."""
    printed = compiled("attention", "--only", "Llama")
    for kernel in ("short_kernel", "long_kernel", "reduce_kernel", "write_kernel"):
        assert kernel in printed
    assert "4 variants compiled for sm_90" in printed


@pytest.mark.slow
def test_every_kernel_is_accepted_by_the_compiler() -> None:
    printed = compiled()
    assert {line.split(",")[0] for line in printed.splitlines()} >= PARTS.keys()


def test_a_part_without_a_name_of_ours_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compile_kernels.main(["rows", "columns"])
    assert "no part columns: there are attention, rows" in capsys.readouterr().err


def test_a_process_that_interprets_kernels_compiles_none() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is 1"):
        compile_kernels.install(compile_kernels.Compiler(is_frontend=True), arch=compile_kernels.HOPPER)
