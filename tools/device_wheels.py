"""`python -m tools.device_wheels [FOLDER]`: collect the wheels that the device machine lacks, for 3.12.

That machine has torch, Triton, transformers and the test tools, and no network. Versions are those installed
here, so that both sides run the same. Exit status 1 if pip finds no wheel, or if all together are too large.
"""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Final

PACKAGES: Final = (
    "annotated-types",
    "cyclopts",
    "docstring-parser",
    "fastapi",
    "httptools",
    "llguidance",
    "msgspec",
    "opentelemetry-api",
    "pydantic",
    "pydantic-core",
    "pytest-asyncio",
    "pyzmq",
    "rich-rst",
    "starlette",
    "typing-inspection",
    "uvicorn",
)
"""What Penstock and its tests import beside what is there already."""

PLATFORMS: Final = (
    "2_39",
    "2_38",
    "2_36",
    "2_35",
    "2_34",
    "2_31",
    "2_28",
    "2_27",
    "2_24",
    "2_17",
    "2_12",
    "2_5",
)
"""Of manylinux: pip matches each by its exact number."""

MAX_BYTES: Final = 48 << 20
"""The carried tree may have 64 MiB with the repository itself."""


def download_command(folder: Path) -> list[str]:
    """The call of pip that fetches exactly these wheels and nothing they ask for."""
    platforms = [f"--platform=manylinux_{number}_x86_64" for number in PLATFORMS]
    platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    pins = [f"{name}=={version(name)}" for name in PACKAGES]
    fixed = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    return [sys.executable, "-m", "pip", "download", "-q", *fixed, *platforms, "-d", str(folder), *pins]


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    given = sys.argv[1:] if argv is None else argv
    folder = Path(given[0]) if given else Path(".whl")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    if subprocess.run(download_command(folder), check=False).returncode:
        return 1
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.whl"))
    print(f"{folder}: {len(list(folder.glob('*.whl')))} wheels, {num_bytes / 2**20:.1f} MiB")
    return int(num_bytes > MAX_BYTES)


if __name__ == "__main__":
    sys.exit(main())
