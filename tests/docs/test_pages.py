"""The pages keep what they promise: generated ones are current, links lead somewhere, nothing is undocumented."""

import re
import subprocess
from pathlib import Path

import pytest

from penstock.models.registry import ARCHITECTURES
from tools import reference

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(reference.PAGES))
def test_a_generated_reference_page_is_current(name: str) -> None:
    assert (reference.FOLDER / name).read_text(encoding="utf-8") == reference.PAGES[name](), "run make docs"


def test_every_setting_is_in_the_reference_with_its_sentence() -> None:
    page = reference.render_settings()
    rows = re.findall(r"^\| `(\w+)` \| .+ \| .* \| \w.+\. \|$", page, re.MULTILINE)
    assert set(rows) == {field.name for field in reference.dataclasses.fields(reference.ServeSettings)}


def test_every_error_is_in_the_reference() -> None:
    page = reference.render_errors()
    assert all(f"`{error.__name__}`" in page for error in reference.error_classes())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_named_in_a_page_exist(page: Path) -> None:
    named = re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in named), named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_test_files_named_in_a_page_exist(page: Path) -> None:
    named = re.findall(r"`((?:tests|tools|benchmarks|penstock)/[\w/]+\.py)", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_architecture_is_in_the_guide() -> None:
    page = (ROOT / "docs/guide/models.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in ARCHITECTURES)


def test_make_bench_runs_every_benchmark() -> None:
    listed = re.search(r"^BENCHMARKS := (.+)$", MAKEFILE, re.MULTILINE)
    assert listed is not None
    needs_a_checkpoint = '"--model", type=Path, required=True'
    scripts = {
        path.stem
        for path in (ROOT / "benchmarks").glob("*.py")
        if needs_a_checkpoint not in path.read_text(encoding="utf-8")
    }
    assert set(listed[1].split()) == scripts - {"__init__", "report", "served", "json_schema_suite"}


def test_every_make_target_says_what_it_does() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    shown = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert targets == set(re.findall(r"^  make ([a-z-]+) ", shown, re.MULTILINE))


@pytest.mark.parametrize(
    "name", ["Makefile", "constraints.txt", ".ci/run", ".pre-commit-config.yaml", "pyproject.toml"]
)
def test_no_host_is_named_where_things_are_installed(name: str) -> None:
    assert "://" not in (ROOT / name).read_text(encoding="utf-8")


def test_ci_calls_the_same_words() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert re.search(r"^make test$", script, re.MULTILINE)
    assert "make test-clients" in script
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_constraints_pin_every_direct_dependency() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[<>=;\[ ]", line)[0].lower().replace("_", "-") for line in wanted}
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in pins if "==" in line}
    assert names - {"triton"} <= pinned


def test_constraints_leave_the_version_of_triton_to_torch():
    """torch's CUDA build, which is what an index gives by default, asks for exactly one: a pin ends `make serve`."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (triton,) = [line for line in pins if line.startswith("triton")]
    assert triton == "triton>=3.6.0,<=3.7.1"
    assert "torch==2.13.0" in pins, "another torch asks for another Triton: widen the range with it"
