"""tools/tidy catches each kind of offender and passes clean files."""

from pathlib import Path

import pytest

from tools import tidy


def _write(root: Path, name: str, source: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")


def _function(num_body_lines: int, *, docstring: str = "") -> str:
    doc = f'    """{docstring}"""\n' if docstring else ""
    return "def f():\n" + doc + "    x = 1\n" * num_body_lines


def test_a_function_of_71_lines_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, "penstock/a.py", _function(70))
    assert any("f has 71 lines, the limit is 70" in line for line in tidy.complaints(tmp_path))


def test_a_docstring_does_not_count(tmp_path: Path) -> None:
    _write(tmp_path, "penstock/a.py", _function(5, docstring="one\n" * 80))
    assert tidy.complaints(tmp_path) == []


def test_a_long_function_in_tools_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, "tools/a.py", _function(70))
    assert len(tidy.complaints(tmp_path)) == 1


def test_a_median_above_nine_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, "penstock/a.py", _function(9))
    assert any("median function has 10 lines" in line for line in tidy.complaints(tmp_path))


@pytest.mark.parametrize("name", ["penstock/utils.py", "penstock/helpers/x.py", "tools/misc.py"])
def test_a_name_that_says_nothing_is_refused(tmp_path: Path, name: str) -> None:
    _write(tmp_path, name, "x = 1\n")
    assert any("says nothing" in line for line in tidy.complaints(tmp_path))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\n",
        "import marshal as m\n",
        "from cloudpickle import loads\n",
        "from torch import load\n",
        "import torch\n\ntorch.load('x')\n",
        "def f():\n    import pickle\n",
    ],
)
def test_a_format_that_carries_code_is_refused(tmp_path: Path, source: str) -> None:
    _write(tmp_path, "penstock/a.py", source)
    assert any("no format that carries code" in line for line in tidy.complaints(tmp_path))


def test_nested_functions_are_measured_too(tmp_path: Path) -> None:
    _write(
        tmp_path,
        "penstock/a.py",
        "def g():\n" + "".join(f"    {line}\n" for line in _function(71).split("\n")),
    )
    names = [line for line in tidy.complaints(tmp_path) if "lines, the limit" in line]
    assert len(names) == 3  # g, f and the median


def test_this_repository_is_tidy() -> None:
    assert tidy.complaints(Path(tidy.__file__).parent.parent) == []
