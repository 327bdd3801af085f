"""Fails the build on what the formatters do not see: `python -m tools.tidy`.

Functions over 70 source lines, a median above 9 lines in the package, file names that say nothing,
and imports of formats that carry code. It reads source text only; nothing is imported.
"""

import ast
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MAX_FUNCTION_LINES: Final = 70
MAX_MEDIAN_LINES: Final = 9
MEANINGLESS_NAMES: Final = frozenset({"utils", "common", "misc", "helpers", "util", "helper"})
CODE_CARRYING_MODULES: Final = frozenset({"pickle", "_pickle", "marshal", "cloudpickle", "dill", "shelve"})

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionSize:
    """One function and its source lines, docstrings not counted."""

    path: Path
    name: str
    line: int
    num_lines: int


def _docstring_lines(node: ast.AST) -> int:
    """Lines of the docstrings of `node` and of all that is defined inside it."""
    total = 0
    for child in ast.walk(node):
        if isinstance(child, Function | ast.ClassDef) and ast.get_docstring(child) is not None:
            first = child.body[0]
            assert first.end_lineno is not None
            total += first.end_lineno - first.lineno + 1
    return total


def function_sizes(path: Path, source: str) -> Iterator[FunctionSize]:
    """Every function of a file, nested ones too; decorators are not counted, the `def` line is."""
    for node in ast.walk(ast.parse(source, filename=str(path))):
        if isinstance(node, Function):
            assert node.end_lineno is not None
            num_lines = node.end_lineno - node.lineno + 1 - _docstring_lines(node)
            yield FunctionSize(path=path, name=node.name, line=node.lineno, num_lines=num_lines)


def _imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        return [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return []


def _loads_with_torch(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "load"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    )


def code_carrying_lines(path: Path, source: str) -> Iterator[str]:
    """Complaints about imports of pickle and its kin, and about `torch.load`."""
    for node in ast.walk(ast.parse(source, filename=str(path))):
        for name in _imported_names(node):
            if name.split(".")[0] in CODE_CARRYING_MODULES or name == "torch.load":
                line = getattr(node, "lineno", 0)
                yield f"{path}:{line}: imports {name}: no format that carries code"
        if _loads_with_torch(node):
            assert isinstance(node, ast.Attribute)
            yield f"{path}:{node.lineno}: torch.load: no format that carries code"


def _name_complaints(path: Path) -> Iterator[str]:
    for part in (*path.parts[:-1], path.stem):
        if part in MEANINGLESS_NAMES:
            yield f"{path}: {part!r} says nothing, name the noun"


def _size_complaints(sizes: list[FunctionSize]) -> Iterator[str]:
    for size in sizes:
        if size.num_lines > MAX_FUNCTION_LINES:
            yield (
                f"{size.path}:{size.line}: {size.name} has {size.num_lines} lines, "
                f"the limit is {MAX_FUNCTION_LINES}"
            )


def _sources(folder: Path, *, root: Path) -> dict[Path, str]:
    paths = sorted(folder.rglob("*.py"))
    return {path.relative_to(root): path.read_text(encoding="utf-8") for path in paths}


def _sizes(sources: dict[Path, str]) -> list[FunctionSize]:
    return [size for path, source in sources.items() for size in function_sizes(path, source)]


def complaints(root: Path) -> list[str]:
    """All that is wrong under `root`, one line each.

    Args:
        root: the repository; `penstock` is judged by every rule, `tools` by names and sizes.
    """
    package, tools = (_sources(root / name, root=root) for name in ("penstock", "tools"))
    found = [line for path in (*package, *tools) for line in _name_complaints(path)]
    found += _size_complaints(_sizes(package) + _sizes(tools))
    found += [line for path, source in package.items() for line in code_carrying_lines(path, source)]
    median = median_lines(root)
    if median > MAX_MEDIAN_LINES:
        found.append(f"penstock: the median function has {median:g} lines, the limit is {MAX_MEDIAN_LINES}")
    return found


def median_lines(root: Path) -> float:
    """Median size of the package's functions; 0 if there are none."""
    sizes = _sizes(_sources(root / "penstock", root=root))
    return float(statistics.median(size.num_lines for size in sizes)) if sizes else 0.0


def main() -> int:
    """Print the complaints and the figures; the return value is the exit code."""
    root = Path(__file__).resolve().parent.parent
    found = complaints(root)
    for line in found:
        print(line)
    sizes = _sizes(_sources(root / "penstock", root=root))
    longest = max((size.num_lines for size in sizes), default=0)
    print(f"tidy: {len(sizes)} functions, median {median_lines(root):g} lines, longest {longest}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
