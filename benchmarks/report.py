"""What every benchmark prints and writes: machine, commit, versions, seed, sizes, medians and percentiles."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from penstock.bench.machine import cpu_name

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds; the median counts")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/NAME.json")
    parser.add_argument("--tiny", action="store_true", help="sizes that only prove that the script works")
    return parser


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, Any]:
    """Machine, commit and versions."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    commit = commit or os.environ.get("PENSTOCK_COMMIT", "")  # a copy of the tree that is no repository
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        **{package: _version(package) for package in PACKAGES},
    }


def percentiles(values: Sequence[float], *, scale: float = 1.0, digits: int = 2) -> dict[str, float]:
    """Median, p50, p90 and p99 of the values times `scale`; empty if there are none."""
    if not values:
        return {}
    ordered = sorted(values)
    picks = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    last = len(ordered) - 1
    return {name: round(ordered[round(q * last)] * scale, digits) for name, q in picks.items()}


def median(values: Sequence[float]) -> float:
    """Median."""
    return statistics.median(values)


def finish(
    name: str, *, options: argparse.Namespace, sizes: dict[str, Any], results: dict[str, Any], ok: bool
) -> int:
    """Print everything, write it if asked; the return value is the exit code.

    Args:
        name: file name of the result.
        options: the parsed arguments.
        sizes: what was run.
        results: what was measured.
        ok: every check held and the bar, if there is one, was met.
    """
    record = {
        "benchmark": name,
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "environment": environment(),
        "seed": options.seed,
        "sizes": sizes,
        "results": results,
        "ok": ok,
    }
    text = json.dumps(record, indent=2)
    print(text)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return 0 if ok else 1
