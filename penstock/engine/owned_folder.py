"""A private folder for sockets that ends with its owner, also with one that was killed.

The owner holds a lock on a file in it for as long as it lives; the kernel gives the lock back when the
process ends, whatever ended it. Whoever makes the next folder beside it removes those whose lock is free. A
folder without such a file, of another user, or behind a link is never touched: nothing is judged by its age,
and no process id, which may have been given to somebody else.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

PREFIX: Final = "penstock-"
LOCK_NAME: Final = ".penstock-owner"
MAX_SWEPT: Final = 256
"""Folders looked at by one start; the next looks at more."""


class OwnedFolder:
    """A folder with mode 0700 that `close`, the collector or the interpreter's end removes."""

    def __init__(self, *, prefix: str = PREFIX, parent: Path | None = None) -> None:
        """Make it, and remove what earlier owners left beside it.

        Args:
            prefix: of its name; begins with `PREFIX`, or nobody would find it.
            parent: where; None takes the system's folder for temporary files.

        Raises:
            OSError: it cannot be made.
        """
        assert prefix.startswith(PREFIX)
        sweep(Path(tempfile.gettempdir()) if parent is None else parent)
        self.path: Final = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = _take(self.path)
        self._finalizer = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def close(self) -> None:
        """Remove it and what is in it; safe to call twice."""
        self._finalizer()


def _take(folder: Path) -> int:
    """The descriptor of a new lock; the file has its name only once the lock is held."""
    unnamed = folder / f"{LOCK_NAME}.new"
    lock = os.open(unnamed, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    unnamed.rename(folder / LOCK_NAME)
    return lock


def _remove(folder: Path, lock: int, owner_pid: int) -> None:
    if os.getpid() != owner_pid:  # a fork has this object too, and the folder is not its own
        return
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def sweep(parent: Path) -> list[Path]:
    """Remove the folders in `parent` whose owners have gone.

    Returns:
        Those that were removed. What cannot be read or removed is left.
    """
    return [folder for folder in islice(_ours(parent), MAX_SWEPT) if _remove_if_left(folder)]


def _ours(parent: Path) -> Iterator[Path]:
    """Folders of this user with our prefix and a lock in them."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if not entry.name.startswith(PREFIX) or not entry.is_dir(follow_symlinks=False):
                continue
            folder = Path(entry.path)
            if entry.stat(follow_symlinks=False).st_uid == os.getuid() and (folder / LOCK_NAME).exists():
                yield folder


def _remove_if_left(folder: Path) -> bool:
    path = folder / LOCK_NAME
    try:
        lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between opening and locking, another sweep may have removed the folder, and a server made its own
        # of that name: the lock counts only for the file that has the name now.
        held, named = os.fstat(lock), path.stat(follow_symlinks=False)
        if not stat.S_ISREG(held.st_mode) or (held.st_dev, held.st_ino) != (named.st_dev, named.st_ino):
            return False
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # somebody holds the lock, or the folder has just gone
        return False
    finally:
        os.close(lock)
    return not folder.exists()
