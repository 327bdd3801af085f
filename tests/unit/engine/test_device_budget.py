"""An engine on a device with memory of its own: the pool gets what is left, and the parts add up."""

from pathlib import Path

import pytest

from penstock.core.errors import StartupError
from penstock.engine import build, memory_plan
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from penstock.engine.runner.kv_budget import GRAPHS_OVERHEAD_BYTES
from tests.oracle.checkpoints import tiny_checkpoint

MIB = 1 << 20


class FakeMemory:
    """A device on which every step takes 5 MiB."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.used_bytes = 100 * MIB
        self.allocated_bytes = 90 * MIB
        self.peak_bytes = 95 * MIB
        self.num_resets = 0

    def reset_peak(self) -> None:
        self.num_resets += 1

    def empty_cache(self) -> None:
        pass


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("budget") / "llama", vocab_size=97)


def core_on(
    path: Path, memory: FakeMemory, monkeypatch: pytest.MonkeyPatch, *, enforce_eager: bool = False, **kv
):
    monkeypatch.setattr(memory_plan, "memory_of", lambda _device: memory)
    config = EngineConfig(
        model_path=str(path),
        dtype="float32",
        kernels="reference",
        kv=KvConfig(block_size=4, **kv),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16),
        max_model_len=40,
        warmup=False,
        enforce_eager=enforce_eager,
    )
    return build_core(config)


@pytest.mark.parametrize("share", [None, 0.5])
def test_the_pool_gets_what_the_share_leaves(path: Path, monkeypatch: pytest.MonkeyPatch, share) -> None:
    memory = FakeMemory(1000 * MIB)
    core = core_on(path, memory, monkeypatch, gpu_memory_utilization=share)
    assert memory.num_resets == 2
    report = core.memory()
    outputs = 4 * 97 * 4  # logits of 4 sequences
    assert (report.activation_bytes, report.graph_bytes) == (
        5 * MIB,
        5 * MIB + outputs + GRAPHS_OVERHEAD_BYTES,
    )
    scratch = core.info.bytes_per_block
    taken = memory.used_bytes + report.activation_bytes + report.graph_bytes + report.kv_bytes_total + scratch
    limit = (share or 0.9) * memory.total_bytes
    assert limit - core.info.bytes_per_block < taken <= limit
    assert report.kv_bytes_total == report.kv_bytes_free + report.kv_bytes_cached + report.kv_bytes_owned
    assert (report.device_bytes_total, report.device_bytes_used) == (1000 * MIB, 100 * MIB)


def test_nothing_is_set_aside_for_graphs_where_none_are_recorded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_refuse_eager_without_device", lambda *_: None)
    report = core_on(path, FakeMemory(1000 * MIB), monkeypatch, enforce_eager=True).memory()
    assert (report.activation_bytes, report.graph_bytes) == (5 * MIB, 0)


def test_a_device_that_is_too_small_says_what_takes_how_much(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        StartupError, match=f"gpu_memory_utilization=0.9 of {380 * MIB} bytes, less {100 * MIB}"
    ):
        core_on(path, FakeMemory(380 * MIB), monkeypatch)


def test_steps_that_do_not_fit_beside_the_weights_say_what_to_lower(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args, **_kwargs):
        raise MemoryError

    monkeypatch.setattr("penstock.engine.runner.runner.Runner.measure_peaks", fail)
    with pytest.raises(StartupError, match="max_num_batched_tokens=16 and max_num_seqs=4 does not fit"):
        core_on(path, FakeMemory(1000 * MIB), monkeypatch)
