"""What the kernel says of this process's memory, and what is said where it says nothing."""

import gc
import os

import pytest

from penstock.observe.memory import resident_bytes, settle


def test_resident_memory_is_the_second_figure_of_statm_in_pages(tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "self/statm").write_text("500 3 2 1 0 4 0\n")
    assert resident_bytes(proc=tmp_path) == 3 * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("content", [None, "", "500", "many pages"])
def test_a_system_that_does_not_tell_gives_zero(tmp_path, content):
    if content is not None:
        (tmp_path / "self").mkdir()
        (tmp_path / "self/statm").write_text(content)
    assert resident_bytes(proc=tmp_path) == 0


def test_once_settled_a_full_collection_passes_over_what_was_there():
    kept = [[] for _ in range(1000)]
    try:
        settle()
        assert gc.get_freeze_count() >= len(kept)
        assert len(gc.get_objects()) < len(kept)
    finally:
        gc.unfreeze()
