"""Every expected error of the command line is one line on stderr and an exit code."""

import subprocess
import sys
from pathlib import Path

import pytest

from penstock.cli.main import main
from tests.docs.tiny_model import make_tiny_model


def _run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = main(list(argv))
    return code, capsys.readouterr().err


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip().count(".") >= 1


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("serve", "chat", "run", "doctor"))


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("serve", "--quantization", "awq"), 2, '"awq" for --quantization'),
        (("serve", "--gpu-memory-utilization=1.5"), 2, "--gpu-memory-utilization"),
        (("serve", "--swap-space=4"), 2, "write --kv-offloading-size"),
        (("run", "a", "b", "--load-format", "gguf"), 2, "load_format is not supported"),
        (("chat", "--fully-sharded-loras"), 2, "fully_sharded_loras is not supported"),
        (("serve", "--nonsense"), 2, "--nonsense"),
        (("serve", "--max-num-seqs", "0"), 2, "between 1 and 4096"),
        (("serve", "no/such/folder/here"), 2, "no/such/folder/here"),
        (("nonsense",), 2, "nonsense"),
        (("run", "missing.jsonl", "out.jsonl"), 2, "missing.jsonl"),
        (("chat", "--temperature", "3"), 2, "--temperature"),
        (("serve", "--chat-template", "/nope"), 2, "chat_template is '/nope': no such file"),
        (("serve", "--chat-template", "/"), 2, "chat_template is '/'"),
    ],
)
def test_a_wrong_command_line_ends_with_one_line(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], code: int, words: str
) -> None:
    got, err = _run(capsys, *argv)
    assert got == code
    assert err.startswith("penstock: ")
    assert words in err
    assert err.count("\n") == 1


def test_a_folder_without_a_model_ends_with_exit_code_3(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, err = _run(capsys, "serve", str(tmp_path))
    assert code == 3
    assert "config.json is missing" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", (100).to_bytes(8, "little") + b'{"a": {"dtype"'),
        ("tokenizer.json", b"{"),
        ("config.json", b"{"),
    ],
)
def test_a_broken_file_ends_with_exit_code_3_and_one_line(tmp_path: Path, file: str, content: bytes) -> None:
    """Also when the engine process is just being started."""
    make_tiny_model(tmp_path)
    (tmp_path / file).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-m", "penstock.cli.main", "serve", str(tmp_path), "--port", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert file in done.stderr
    assert done.stderr.count("\n") == 1
