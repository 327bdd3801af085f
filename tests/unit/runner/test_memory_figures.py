"""Figures of the kernel's files, read from made-up ones."""

import pytest

from penstock.engine.runner.host_memory import available_memory_bytes


@pytest.fixture
def machine(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    write.available = lambda: available_memory_bytes(proc=tmp_path / "proc", cgroup=tmp_path / "cgroup")
    return write


def test_without_a_limit_the_machines_available_memory_counts(machine):
    assert machine.available() == 4000 * 1024


def test_a_container_limit_less_what_is_used_counts_where_it_is_smaller(machine):
    machine("cgroup/memory.max", "1000000\n")
    machine("cgroup/memory.current", "400000\n")
    assert machine.available() == 600_000


def test_a_limit_on_a_parent_group_binds_too(machine):
    machine("proc/self/cgroup", "0::/a/b\n")
    machine("cgroup/a/b/memory.max", "max\n")
    machine("cgroup/a/b/memory.current", "1\n")
    machine("cgroup/a/memory.max", "500\n")
    machine("cgroup/a/memory.current", "900\n")
    assert machine.available() == 0


def test_cgroup_version_one_is_read(machine):
    machine("cgroup/memory/memory.limit_in_bytes", "9999\n")
    machine("cgroup/memory/memory.usage_in_bytes", "999\n")
    assert machine.available() == 9000


def test_a_machine_that_tells_nothing_gives_none(tmp_path):
    assert available_memory_bytes(proc=tmp_path, cgroup=tmp_path) is None
