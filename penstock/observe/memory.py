"""How much memory this process holds."""

import os
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")


def resident_bytes(*, proc: Path = PROC) -> int:
    """Bytes of physical memory that this process holds; 0 where the system does not tell."""
    try:
        resident_pages = int((proc / "self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return resident_pages * os.sysconf("SC_PAGE_SIZE")
