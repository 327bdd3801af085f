"""What README and the guide name is there: every flag, metric and route."""

import re
from pathlib import Path
from typing import Final

import pytest
from cyclopts import App

from penstock.cli.bench import bench
from penstock.cli.main import app
from penstock.observe.catalogue import METRICS, PREFIX
from penstock.server.admin import ADMIN_ROUTES
from penstock.server.app import PUBLIC_ROUTES

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = [ROOT / "README.md", *sorted((ROOT / "docs/guide").glob("*.md"))]
COMMANDS: Final = ("serve", "chat", "run", "doctor")
BENCHMARKS: Final = ("serve", "sweep", "offline", "kernels", "ladder", "compare", "peer")
OTHERS_FLAGS: Final = {"--help", "--no-index", "--no-deps", "--target"}
"""Of every command, and of pip."""
FIRST_PARTS: Final = "v1|v2|admin|health|metrics|score|rerank|classify|tokenize|detokenize|generate|stream"
ROUTE: Final = rf"(?<![\w/.:])(/(?:{FIRST_PARTS})\b[a-z0-9_/]*)"


def _flags(command: App) -> set[str]:
    found = {name for argument in command.assemble_argument_collection() for name in argument.names}
    return found | {f"--no-{name[2:]}" for name in found}


def _scripts() -> str:
    """Text of what is started by `python -m` and `make`, whose flags are read by others."""
    paths = [p for folder in ("tools", "benchmarks", "examples") for p in (ROOT / folder).rglob("*.py")]
    return "".join(path.read_text(encoding="utf-8") for path in paths)


@pytest.fixture(scope="module")
def flags() -> set[str]:
    ours = [*(app[name] for name in COMMANDS), *(bench[name] for name in BENCHMARKS)]
    scripts = set(re.findall(r"\"(--[a-z-]+)\"", _scripts()))
    return set().union(*map(_flags, ours)) | scripts | OTHERS_FLAGS


def _named(pattern: str, page: Path) -> set[str]:
    return set(re.findall(pattern, page.read_text(encoding="utf-8")))


def _page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_page_id)
def test_every_flag_named_in_a_page_exists(page: Path, flags: set[str]) -> None:
    assert _named(r"(?<![\w-])--[a-z][a-z0-9-]+", page) - flags == set()


@pytest.mark.parametrize("page", PAGES, ids=_page_id)
def test_every_metric_named_in_a_page_exists(page: Path) -> None:
    """A name that ends with a line stands for all that begin so."""
    known = {PREFIX + spec.name for spec in METRICS}
    named = _named(rf"\b{PREFIX}[a-z_]+", page)
    assert {name for name in named if name not in known and not _begins_some(name, known)} == set()


def _begins_some(name: str, known: set[str]) -> bool:
    return name.endswith("_") and any(each.startswith(name) for each in known)


@pytest.mark.parametrize("page", PAGES, ids=_page_id)
def test_every_route_named_in_a_page_exists(page: Path) -> None:
    known = {route.path for route in (*PUBLIC_ROUTES, *ADMIN_ROUTES)}
    assert _named(ROUTE, page) - known == set()
