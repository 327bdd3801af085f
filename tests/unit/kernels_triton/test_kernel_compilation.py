"""Triton's compiler takes the kernels, which tests otherwise only interpret."""

import os
import subprocess
import sys

import pytest

from tools import compile_kernels
from tools.kernel_cases import PARTS

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.mark.parametrize("only", ["Llama", pytest.param("", marks=pytest.mark.slow)])
def test_every_kernel_is_accepted_by_the_compiler(only: str) -> None:
    """For the device of `compile_kernels`, which is not there; in a process that interprets nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.compile_kernels", "--frontend", "--only", only],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {line.split(",")[0] for line in done.stdout.splitlines()} >= PARTS.keys()
    for kernel in ("short_kernel", "long_kernel", "reduce_kernel", "write_kernel"):
        assert kernel in done.stdout


def test_a_part_without_a_name_of_ours_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compile_kernels.main(["rows", "columns"])
    assert "no part columns: there are attention, rows" in capsys.readouterr().err


def test_a_process_that_interprets_kernels_compiles_none() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is 1"):
        compile_kernels.install(compile_kernels.Compiler(is_frontend=True), arch=compile_kernels.HOPPER)
