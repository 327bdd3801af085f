"""The start table says what was chosen and why; the curl line is one that a shell can run."""

import io
import json
import logging
import shlex
import warnings
from types import SimpleNamespace

import msgspec
import pytest
from rich.console import Console

from penstock.cli.resolved import concurrent_requests, readable_bytes, resolved_choices
from penstock.cli.serve import _show, logged_warnings
from penstock.cli.settings import ServeSettings
from penstock.cli.start_table import LoadingBar, curl_line, print_address, print_choices
from penstock.core.tokens import AdapterReport, EngineInfo


@pytest.fixture
def info() -> EngineInfo:
    fields = dict.fromkeys(EngineInfo.__struct_fields__, 1)
    known = {
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "kernels": "native",
        "kernels_detail": "avx512, 2 threads",
        "execution": "recorded",
        "quantization": "none",
        "kv_cache_dtype": "bfloat16",
        "deterministic": False,
        "labels": (),
        "device": "cpu",
        "device_detail": "torch sees no CUDA device",
        "block_size": 16,
        "num_blocks": 1000,
        "num_cache_groups": 2,
        "max_model_len": 4096,
        "max_num_seqs": 64,
        "num_parameters": 7_966_848,
        "cache_group_windows": (None, 512),
        "speculation": "none",
        "async_scheduling": False,
        "enable_lora": False,
        "adapters": (),
    }
    return msgspec.convert({**fields, **known}, EngineInfo)


def test_concurrent_requests_counts_blocks_of_every_group(info: EngineInfo) -> None:
    # 512 tokens are 32 blocks in each of 2 groups: 1000 // 64 = 15
    assert concurrent_requests(info, num_tokens=512) == 15


def test_a_window_group_holds_its_window_and_one_block(info: EngineInfo) -> None:
    # 1024 tokens: 64 blocks, and 512 + 16 of the window are 33: 1000 // 97 = 10
    assert concurrent_requests(info, num_tokens=1024) == 10


def test_concurrent_requests_are_at_most_max_num_seqs(info: EngineInfo) -> None:
    assert concurrent_requests(info, num_tokens=16) == 64


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(5, "5 B"), (2048, "2.0 KiB"), (3 << 20, "3.0 MiB"), (3 << 29, "1.5 GiB")]
)
def test_bytes_are_shown_in_the_largest_unit(num_bytes: int, text: str) -> None:
    assert readable_bytes(num_bytes) == text


def test_a_choice_says_whether_it_was_asked_for(info: EngineInfo) -> None:
    auto = {choice.name: choice for choice in resolved_choices(ServeSettings(), info)}
    asked = {choice.name: choice for choice in resolved_choices(ServeSettings(dtype="bfloat16"), info)}
    assert auto["dtype"].reason == "the checkpoint's"
    assert asked["dtype"].reason == "asked for"


def test_the_table_holds_what_the_operator_needs(info: EngineInfo) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, width=200)
    print_choices(console, model="m", choices=resolved_choices(ServeSettings(), info))
    text = out.getvalue()
    words = (
        "7,966,848",
        "bfloat16",
        "native (avx512, 2 threads)",
        "recorded",
        "quantization",
        "weights",
        "KV budget",
        "1,000 of 16 tokens",
        "15 of 512 tokens",
    )
    assert all(word in text for word in words), text


def test_the_curl_line_is_one_shell_command_with_a_json_body() -> None:
    words = shlex.split(curl_line("http://127.0.0.1:8000", model="m", has_key=True))
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "m"
    assert any("Authorization" in word for word in words)


def test_the_address_and_the_curl_line_are_plain_lines_on_stdout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    print_address("http://127.0.0.1:8000", model="m", has_key=False)
    captured = capsys.readouterr()
    ready, curl = captured.out.splitlines()
    assert ready.startswith("ready at http://127.0.0.1:8000, ")
    assert curl == curl_line("http://127.0.0.1:8000", model="m", has_key=False)
    assert captured.err == ""


def test_the_curl_line_comes_after_the_line_of_the_log(
    info: EngineInfo, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a terminal both are seen, and what is to be copied must not be lost above a dozen lines of JSON."""
    monkeypatch.setattr(logging.getLogger("penstock.cli"), "info", lambda words, **_: print(f"log: {words}"))
    _show(
        Console(file=io.StringIO()),
        SimpleNamespace(backend=SimpleNamespace(info=info)),
        settings=ServeSettings(),
        source=SimpleNamespace(name="m"),
        addresses=SimpleNamespace(public="http://127.0.0.1:8000", admin=None),
    )
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["log:", "ready", "curl"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_table_is_for_terminals(info: EngineInfo, is_terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=200)
    print_choices(console, model="m", choices=resolved_choices(ServeSettings(), info))
    assert bool(out.getvalue()) == is_terminal


def test_a_warning_is_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with logged_warnings(), caplog.at_level("WARNING", logger="penstock.cli"):
        warnings.simplefilter("default")
        warnings.warn("old", UserWarning, stacklevel=1)
    assert [(one.levelname, one.getMessage()) for one in caplog.records] == [("WARNING", "UserWarning: old")]


def test_the_bar_is_silent_without_a_terminal() -> None:
    out = io.StringIO()
    with LoadingBar(Console(file=out), model="m") as bar:
        bar.update(5, 10)
    assert out.getvalue() == ""


def test_the_memory_row_adds_up(info: EngineInfo) -> None:
    gib = 1 << 30
    sizes = {
        "weights_bytes": 16 * gib,
        "kv_bytes": 100 * gib,
        "activation_bytes": 2 * gib,
        "graph_bytes": gib,
    }
    fields = {**sizes, "device_bytes": 140 * gib, "kv_offload_bytes": 4 * gib}
    settings = ServeSettings(gpu_memory_utilization=0.85)
    choices = resolved_choices(settings, msgspec.structs.replace(info, **fields))
    rows = {choice.name: choice for choice in choices}
    assert rows["memory"].value == "119.0 GiB of 140.0 GiB"
    assert rows["memory"].reason == (
        "weights 16.0 GiB, KV 100.0 GiB, activations 2.0 GiB, graphs 1.0 GiB; beside it 4.0 GiB of host memory "
        "for KV"
    )
    assert rows["KV budget"].reason == "0.85 of 140.0 GiB, less all else"


def test_the_table_says_how_many_adapters_fit_and_what_they_take(info: EngineInfo) -> None:
    def adapter(name: str, *, num_bytes: int, is_in_memory: bool) -> AdapterReport:
        return AdapterReport(
            name=name,
            revision=name,
            rank=8,
            num_bytes=num_bytes,
            is_in_memory=is_in_memory,
            num_requests=0,
            path=name,
        )

    settings = ServeSettings(enable_lora=True, max_loras=4, max_lora_rank=16, max_cpu_loras=1000)
    loaded = (
        adapter("french", num_bytes=3 << 20, is_in_memory=True),
        adapter("legal", num_bytes=5 << 20, is_in_memory=False),
    )
    rows = resolved_choices(settings, msgspec.structs.replace(info, enable_lora=True, adapters=loaded))
    row = {choice.name: choice for choice in rows}["adapters"]
    assert row.value == "4 slots, ranks up to 16"
    assert row.reason == "2 loaded with 3.0 MiB of at most 1.0 GiB; in memory at most 1,000"


def test_the_table_is_silent_about_adapters_that_are_not_enabled(info: EngineInfo) -> None:
    assert "adapters" not in {choice.name for choice in resolved_choices(ServeSettings(), info)}
