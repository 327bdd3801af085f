"""A wrong flag of `penstock bench` is one line that names it, exit code 2, and nothing is started."""

from pathlib import Path

import pytest

from penstock.bench.compare.comparison import OURS, Standing
from penstock.cli.bench_compare import _bound_of, _tell_if_alone
from penstock.cli.main import main
from penstock.core.errors import StartupError
from penstock.kernels.cpu import extension


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("kernels", "--shapes", "foo"), "shapes has 'foo'"),
        (("kernels", "--rows", "0"), "rows is '0'"),
        (("offline", "--batch-sizes", "0"), "batch_sizes is '0'"),
        (("ladder", "--rungs", "foo"), "rungs has 'foo'"),
        (("ladder", "--prompt-tokens", "9:1"), "prompt_tokens is '9:1'"),
        (("ladder", "--penstock-flags", "'"), "penstock_flags is"),
        (("compare", "--peers", "foo"), "peers has 'foo'"),
        (("compare", "--attach", "foo"), "attach has 'foo'"),
        (("compare", "--penstock-flags", "'"), "penstock_flags is"),
    ],
)
def test_a_wrong_flag_of_a_benchmark_is_exit_code_2(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: str
) -> None:
    assert main(["bench", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("penstock: ")
    assert words in err
    assert err.count("\n") == 1


def test_a_comparison_of_nobody_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "compare", "--no-penstock", "--peers-dir", str(tmp_path)]) == 2
    assert "nobody to compare" in capsys.readouterr().err


def test_a_comparison_with_nobody_says_so_before_it_measures(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ours, theirs = (Standing(name=name, precision="bf16", contender=None) for name in (OURS, "vllm"))
    _tell_if_alone([ours, theirs], peers_dir=tmp_path)
    assert capsys.readouterr().err == ""
    _tell_if_alone([ours], peers_dir=tmp_path)
    assert "no peer is installed" in capsys.readouterr().err


@pytest.mark.skipif(extension.why_missing() is not None, reason="the extension module is not there")
def test_a_wrong_instruction_set_is_told_by_the_name_it_was_given_by() -> None:
    with pytest.raises(StartupError, match="^isa is 'nonsense'"):
        extension.choose_isa("nonsense", environ={})
    with pytest.raises(StartupError, match="^PENSTOCK_ISA is 'nonsense'"):
        extension.choose_isa(environ={"PENSTOCK_ISA": "nonsense"})


def test_a_model_that_only_peers_know_is_compared_without_a_bound(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"architectures": ["UnheardOfForCausalLM"]}')
    assert _bound_of(tmp_path, num_threads=1) is None
    assert "shares of the bound are left out" in capsys.readouterr().err
