"""Where and with what a figure was measured: machine, commit, versions. Every result carries it."""

import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
GIT_TIMEOUT_S: Final = 10.0
PACKAGES: Final = ("penstock", "aiohttp", "uvloop", "numpy", "msgspec")


def environment(*, packages: tuple[str, ...] = PACKAGES) -> dict[str, object]:
    """Facts of this machine and this program, as they go into a result.

    Args:
        packages: whose versions to tell, by their names in the package index.
    """
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {package: package_version(package) for package in packages},
    }


def machine_words() -> str:
    """The machine, the commit and the time in one line, for pictures."""
    facts = environment(packages=())
    return f"{facts['cpu']}, {facts['cores']} cores, commit {facts['commit'] or 'unknown'}, {facts['date']}"


def cpu_name() -> str:
    """The processor's own name; what the platform calls it where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def package_version(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Short commit of the source tree, with `+` if it has changes; None outside of a checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    head = _git("rev-parse", "--short", "HEAD")
    return f"{head}+" if head and _git("status", "--porcelain", "--untracked-files=no") else head


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(  # noqa: S603 - fixed words, no shell
            command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_S
        )
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip()
