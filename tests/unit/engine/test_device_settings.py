"""Where the engine computes: what is refused before anything is loaded."""

from pathlib import Path

import pytest

from penstock.core.errors import StartupError
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, validate_engine_config
from penstock.kernels import devices


def test_an_unknown_device_is_refused_by_name() -> None:
    with pytest.raises(StartupError, match="device is 'tpu', it must be one of auto, cpu, cuda"):
        validate_engine_config(EngineConfig(model_path="x", device="tpu"))


def test_cuda_where_there_is_none_is_refused_before_the_model_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "torch sees no CUDA device")
    with pytest.raises(StartupError, match="torch sees no CUDA device; --device cpu runs here"):
        build_core(EngineConfig(model_path=str(tmp_path / "absent"), device="cuda"))


def test_graphs_cannot_be_switched_off_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(
        StartupError, match="enforce_eager switches CUDA graphs off, but the model computes on"
    ):
        build_core(EngineConfig(model_path=str(tmp_path / "absent"), device="cpu", enforce_eager=True))
