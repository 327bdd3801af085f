"""A wrong setting is told by its name, its value and what it may be, before anything is started."""

from pathlib import Path

import pytest

from penstock.cli.main import main
from penstock.core.errors import StartupError
from penstock.engine.config import (
    EngineConfig,
    KvConfig,
    LoraConfig,
    read_speculative,
    validate_engine_config,
)
from penstock.server.lifecycle import bind

CHOICES = "it must be one of ngram, draft_model"


def _refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("penstock: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "x"}, f"speculative_config: method is 'x', {CHOICES}"),
        ({"num_speculative_tokens": "3"}, f"speculative_config: method is missing, {CHOICES}"),
        ({"method": "ngram", "tokens": "3"}, "'tokens' is not known, it has method, model, num_speculative"),
        (
            {"method": "ngram", "num_speculative_tokens": "many"},
            "num_speculative_tokens is 'many', it must be a whole number",
        ),
        ({"method": "draft_model", "model": 3}, "model is '3', it must be a text"),
    ],
)
def test_a_wrong_speculative_config_is_told_with_the_choices(given: dict[str, object], words: str) -> None:
    with pytest.raises(StartupError) as refused:
        read_speculative(given)
    assert words in refused.value.message


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--port=nonsense", '--port: "nonsense" is not a whole number. It must be between 0 and 65535.'),
        ("--max-num-seqs=1.5", '"1.5" is not a whole number. It must be between 1 and 4096.'),
        ("--decode-stretch=x", '"x" is not a number. It must be between 1 and 1000000.'),
        ("--deterministic=x", '--deterministic: "x" is not true or false.'),
        ("--speculative-config=x", '--speculative-config: "x" is not a JSON object.'),
        ("--speculative-config={}", CHOICES),
        ("--max-num-batched-tokens=9", "9, it must be between 64 and 1048576: a step has a token of every"),
        ("--max-loras=9", "max_loras is 9, which needs enable_lora"),
        ("--lora-dir=/", "lora_dir is set, which needs enable_lora"),
        ("--served-model-name=a b", "served_model_name is 'a b', it must be 1 to 128 characters of"),
        ("--revision=main", "revision is 'main', but the embedded model has none"),
        ("--chat-template=/", "chat_template is '/', which is not a file"),
    ],
)
def test_a_wrong_flag_of_serve_is_told_with_its_limit(
    capsys: pytest.CaptureFixture[str], flag: str, words: str
) -> None:
    assert words in _refusal(capsys, "serve", flag)


def test_a_value_from_elsewhere_is_told_with_the_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("deterministic: perhaps\n")
    assert f"provided by {file}" in _refusal(capsys, "serve", f"--config={file}")
    monkeypatch.setenv("PENSTOCK_MAX_NUM_SEQS", "1.5")
    assert "provided by the environment's PENSTOCK_MAX_NUM_SEQS: " in _refusal(capsys, "serve")


def test_a_whole_number_may_be_written_with_a_point(capsys: pytest.CaptureFixture[str]) -> None:
    """It passes; what is refused is the next flag."""
    assert "--port" in _refusal(capsys, "serve", "--max-num-seqs=30.0", "--port=x")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("sweep", "--loads=nan"), "loads is nan, it must be 1 to"),
        (("sweep", "--loads=inf"), "loads is inf, it must be 1 to"),
        (("sweep", "--loads=1.5"), "loads is 1.5, with over concurrency it must be whole numbers"),
        (("serve", "--random-input-len=0"), "random_input_len is 0, it must be at least 1 token"),
        (("serve", "--tokenizer=/nope"), "tokenizer is '/nope', there is no tokenizer.json in it"),
        (("serve", "--result-filename=/"), "result_filename is '/', which is a folder"),
        (("kernels", "--formats=x"), "formats has 'x'"),
        (("kernels", "--operations=x"), "operations has 'x'"),
        (("kernels", "--output=/"), "output is '/', which is a folder"),
        (("offline", "--output=/"), "output is '/', which is a folder"),
        (("ladder", "--output=/"), "output is '/', which is a folder"),
        (("ladder", "--plot=/"), "plot is '/', which is a folder"),
        (("compare", "--output=/"), "output is '/', which is a folder"),
        (("compare", "--attach=vllm=x"), "attach is 'x', it must be like http://host:8000"),
    ],
)
def test_a_benchmark_is_refused_before_it_measures(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: str
) -> None:
    """Nothing listens where `serve` and `sweep` look, and none of these looks there."""
    assert words in _refusal(capsys, "bench", *argv)


def test_a_file_in_place_of_a_folder_for_logs_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert "log_dir: the folder" in _refusal(capsys, "bench", "compare", f"--log-dir={file}")


@pytest.mark.parametrize("param", ["api_key", "admin_key"])
def test_an_empty_key_is_told_by_the_setting(param: str) -> None:
    from penstock.cli.http_side import _ring
    from penstock.core.ids import TenantId

    with pytest.raises(StartupError, match=f"^{param} has 0 characters, it must have 1 to 512"):
        _ring("", tenant=TenantId("t"), param=param)


def test_a_name_that_no_resolver_takes_is_one_line() -> None:
    with pytest.raises(StartupError, match="host .* must be an address"):
        bind("a" * 70, 0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"kv": KvConfig(num_blocks=1)}, "num_kv_blocks is 1, it must be between 2"),
        ({"kv": KvConfig(block_size=12)}, "block_size is 12, it must be a power of two from 1 to"),
        ({"lora": LoraConfig(max_cpu_loras=1000)}, "max_cpu_loras is 1000, which needs enable_lora"),
    ],
)
def test_the_engine_names_settings_as_the_user_does(config: dict[str, object], words: str) -> None:
    with pytest.raises(StartupError) as refused:
        validate_engine_config(EngineConfig(model_path="x", model_revision="r", **config))
    assert words in refused.value.message
    assert refused.value.param in words


def test_a_chat_with_nobody_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    assert main(["chat", "--url", url]) == 1
    assert capsys.readouterr().err == f"penstock: {url}: no server answers: Connection refused\n"
