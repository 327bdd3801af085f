"""What a recording makes of a model's own torch calls, and what becomes of a model that cannot be recorded."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from penstock.kernels.batch import ForwardBatch
from penstock.kernels.cpu import passes
from penstock.kernels.cpu import tape as t
from penstock.kernels.cpu.recorder import TRACE_ROWS, NotRecordableError, Recorder, TorchCalls
from penstock.models import llama, registry
from penstock.models.config import ConfigReader
from penstock.models.interface import CausalLM
from penstock.models.loader import load_model
from penstock.models.parts import Parts
from tests.docs.tiny_model import make_tiny_model
from tests.oracle.paged_driver import PagedDriver
from tests.unit.kernels_recording.tape_builder import kinds


def record(work: Callable[[Tensor], Tensor], cols: int = 8) -> t.Tape:
    recorder = Recorder()
    x = recorder.add_input(torch.empty(TRACE_ROWS, cols, dtype=torch.bfloat16, device="meta"))
    with torch.no_grad(), TorchCalls(recorder):
        result = work(x)
    return recorder.tape(result)


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda x: x + x, ["Sum"]),
        (lambda x: x * 2.0, ["Scale"]),
        (lambda x: x * torch.tensor(2.0, dtype=torch.bfloat16), ["Scale"]),
        (lambda x: x.float(), ["Convert"]),
        (lambda x: x.clone(), ["Convert"]),
        (lambda x: x.view(TRACE_ROWS, 2, 4).flatten(1), []),
        (lambda x: x.chunk(2, dim=-1)[1], []),
        (lambda x: torch.split(x, [2, 6], dim=1)[1], []),
        (lambda x: x[:, 3:5], []),
    ],
)
def test_sums_products_with_a_number_and_copies_are_operations_and_views_are_none(
    work: Callable[[Tensor], Tensor], expected: list[str]
) -> None:
    assert kinds(record(work)) == [*expected, "Convert"]


def test_a_view_names_its_columns() -> None:
    (copy,) = record(lambda x: x.chunk(2, dim=-1)[1]).operations
    assert isinstance(copy, t.Convert)
    assert (copy.x.col, copy.x.cols) == (4, 4)


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (torch.relu, "a call of torch's aten.relu"),
        (lambda x: x * x, "a call of torch's aten.mul"),
        (lambda x: x + 1.0, "a call of torch's aten.add"),
        (lambda x: x[:, ::2], "is not columns"),
        (lambda x: x.t(), "is not columns"),
        (lambda _: torch.empty(TRACE_ROWS, 8, device="meta"), "no recorded call made"),
    ],
)
def test_what_no_operation_stands_for_is_refused_by_name(
    work: Callable[[Tensor], Tensor], words: str
) -> None:
    with pytest.raises(NotRecordableError, match=words):
        record(work)


class Restless(llama.LlamaForCausalLM):
    """A model from outside that asks torch for something between its layers."""

    def forward(self, batch: ForwardBatch) -> Tensor:
        return torch.clamp(super().forward(batch), -1e4, 1e4)


def _build(reader: ConfigReader, parts: Parts) -> CausalLM:
    return Restless(llama.read_config(reader, served_max_len=parts.max_model_len), parts=parts)


def test_a_model_that_cannot_be_recorded_runs_op_by_op_on_the_same_kernels_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = ModuleType("restless_model")
    module.build_model = _build  # type: ignore[attr-defined]  # a module made here
    monkeypatch.setitem(sys.modules, "restless_model", module)
    monkeypatch.setitem(registry.ARCHITECTURES, "RestlessForCausalLM", "restless_model")  # type: ignore[misc]  # a plug-in
    plain = make_tiny_model(tmp_path / "plain", head_dim=32)
    restless = make_tiny_model(tmp_path / "restless", head_dim=32)
    config = json.loads((restless / "config.json").read_text())
    (restless / "config.json").write_text(json.dumps({**config, "architectures": ["RestlessForCausalLM"]}))
    with caplog.at_level(logging.WARNING):
        loaded = load_model(restless, dtype="bfloat16", kernels="native")
    assert loaded.execution.startswith("op by op: a call of torch's aten.clamp")
    assert "cannot be recorded" in caplog.text
    expected = load_model(plain, dtype="bfloat16", kernels="native")
    assert expected.execution == "recorded"
    steps = [
        PagedDriver(each, block_size=16).step([("a", list(range(40)))])["a"] for each in (loaded, expected)
    ]
    torch.testing.assert_close(steps[0], steps[1], atol=0.15, rtol=0.05)  # roundings of bfloat16


def test_the_memory_of_logits_is_taken_again_once_nobody_holds_it(tmp_path: Path) -> None:
    loaded = load_model(make_tiny_model(tmp_path, head_dim=32), dtype="bfloat16", kernels="native")
    hidden = torch.zeros(3, 32, dtype=torch.bfloat16)
    first = loaded.model.logits(hidden)
    second = loaded.model.logits(hidden)
    assert first.data_ptr() != second.data_ptr(), "both are held"
    address = first.data_ptr()
    del first
    assert loaded.model.logits(hidden[:2]).data_ptr() == address


def test_every_pass_keeps_a_tape_that_names_only_its_own_buffers(tmp_path: Path) -> None:
    """After each pass of a whole model's tape: no stray buffer, and each result is still written."""
    from penstock.kernels.cpu.kernel_set import NativeKernels
    from penstock.models.recorded import RecordedModel, record_forward

    loaded = load_model(make_tiny_model(tmp_path, head_dim=32), dtype="bfloat16", kernels="native")
    assert isinstance(loaded.model, RecordedModel)
    assert isinstance(loaded.kernels, NativeKernels)
    kv = loaded.kv_shape(block_size=16)
    tape = record_forward(loaded.model.plain, loaded.kernels, kv=kv)
    for each in passes.PASSES:
        tape = each(tape)
        touched = [place for op in tape.operations for place in (*op.read(), *op.written())]
        assert all(place.col + place.cols <= tape.buffers[place.buffer].cols for place in touched)
        written = {place.buffer for op in tape.operations for place in op.written()}
        assert set(tape.outputs) <= written
    assert kinds(tape).count("Linear") == 3 * 2, "query-key-value, output and down of each layer"
    assert len(tape.operations) == 2 + 2 * 8 + 1


def test_a_model_is_recorded_in_inference_mode_too(tmp_path: Path) -> None:
    """Whoever loads a model may have switched gradients off that way."""
    with torch.inference_mode():
        loaded = load_model(make_tiny_model(tmp_path, head_dim=32), dtype="bfloat16", kernels="native")
    assert loaded.execution == "recorded"
