"""What this machine has of free memory, read from the kernel's own files, and how to give it memory back.

Nothing is limited here; `kv_budget` asks. What the process holds tells `observe/memory`.
"""

import ctypes
import mmap
import sys
from pathlib import Path
from typing import Final

import torch

PROC: Final = Path("/proc")
CGROUP: Final = Path("/sys/fs/cgroup")
KIB: Final = 1024
MADV_DONTNEED: Final = 4


def available_memory_bytes(*, proc: Path = PROC, cgroup: Path = CGROUP) -> int | None:
    """Bytes that could be allocated now without swapping, or None where the kernel does not tell.

    The smaller of the machine's `MemAvailable` and what the control group of a container leaves (cgroup v2,
    or v1's memory controller).
    """
    found = [_mem_available(proc / "meminfo"), *_cgroup_room(cgroup, proc=proc)]
    return min((value for value in found if value is not None), default=None)


def _mem_available(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * KIB
    return None


def _cgroup_room(cgroup: Path, *, proc: Path) -> list[int | None]:
    """Limit minus use for this process's group and every group above it: each of them binds."""
    own = _cgroup_path(proc / "self/cgroup")
    folders = [cgroup / own, *(cgroup / parent for parent in own.parents)]
    rooms = [_room(folder / "memory.max", folder / "memory.current") for folder in folders]
    old = cgroup / "memory"
    rooms.append(_room(old / "memory.limit_in_bytes", old / "memory.usage_in_bytes"))
    return rooms


def _cgroup_path(listing: Path) -> Path:
    try:
        lines = listing.read_text().splitlines()
    except OSError:
        return Path()
    for line in lines:
        if line.startswith("0::/"):
            return Path(line.removeprefix("0::/"))
    return Path()


def _room(limit: Path, used: Path) -> int | None:
    try:
        return max(0, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no such group, or the limit is the word `max`
        return None


def release_pages(tensor: torch.Tensor) -> None:
    """Hand the pages behind a tensor on the CPU back to the kernel; its numbers are zero from here on.

    Whole pages alone can be given back: the rest is cleared. Where the kernel has no such call all is cleared
    and stays taken.

    Args:
        tensor: contiguous, over private memory that no file backs.
    """
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    flat = tensor.view(-1).view(torch.uint8)
    if sys.platform != "linux" or last <= first or not _dont_need(first, last - first):
        flat.zero_()
        return
    flat[: first - start].zero_()
    flat[last - start :].zero_()


def _dont_need(address: int, num_bytes: int) -> bool:
    libc = ctypes.CDLL(None)
    done = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), MADV_DONTNEED)
    return bool(done == 0)
