"""A folder ends with its owner, also with one that was killed; nothing else in its place is touched."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.engine.owned_folder import LOCK_NAME, OwnedFolder, sweep

KILLED_OWNER = """
import os, signal, sys
from pathlib import Path
from penstock.engine.owned_folder import OwnedFolder
folder = OwnedFolder(parent=Path(sys.argv[1]))
(folder.path / "engine-1").write_text("")
os.kill(os.getpid(), signal.SIGKILL)
"""


def _left(parent: Path, name: str = "penstock-left") -> Path:
    """As an owner that has gone leaves it."""
    folder = parent / name
    folder.mkdir(mode=0o700)
    (folder / LOCK_NAME).write_text("")
    (folder / "engine-1").write_text("")
    return folder


def test_a_folder_is_private_and_goes_when_it_is_closed(tmp_path: Path) -> None:
    folder = OwnedFolder(parent=tmp_path)
    assert folder.path.stat().st_mode & 0o777 == 0o700
    folder.close()
    folder.close()
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_dropped_goes_too(tmp_path: Path) -> None:
    OwnedFolder(parent=tmp_path)
    gc.collect()
    assert not any(tmp_path.iterdir())


def test_what_a_killed_owner_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED_OWNER, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    folder = OwnedFolder(parent=tmp_path)
    assert list(tmp_path.iterdir()) == [folder.path]
    assert folder.path != left
    folder.close()


def test_the_folder_of_a_living_owner_stays_whatever_its_age(tmp_path: Path) -> None:
    folder = OwnedFolder(parent=tmp_path)
    os.utime(folder.path, (0, 0))
    os.utime(folder.path / LOCK_NAME, (0, 0))
    assert sweep(tmp_path) == []
    assert folder.path.is_dir()
    folder.close()


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    outside = _left(tmp_path / "..", name=f"penstock-outside-{os.getpid()}")
    (tmp_path / "penstock-link").symlink_to(outside)
    (tmp_path / "penstock-plain").mkdir()
    (tmp_path / "penstock-file").write_text("")
    _left(tmp_path, name="another-left")
    linked = _left(tmp_path, name="penstock-linked")
    (linked / LOCK_NAME).unlink()
    (linked / LOCK_NAME).symlink_to(outside / LOCK_NAME)
    strange = _left(tmp_path, name="penstock-strange")
    (strange / LOCK_NAME).unlink()
    (strange / LOCK_NAME).mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert sweep(tmp_path) == []
    assert sorted(tmp_path.rglob("*")) == before
    assert (outside / "engine-1").is_file()


def test_another_users_folder_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _left(tmp_path)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert sweep(tmp_path) == []
    monkeypatch.undo()
    assert sweep(tmp_path) == [folder]


def test_a_place_that_cannot_be_read_is_left(tmp_path: Path) -> None:
    assert sweep(tmp_path / "absent") == []
