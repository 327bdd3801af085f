"""defaults < file < environment < flags; whatever no setting bears is refused by name."""

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from cyclopts import App, CycloptsError, Parameter

from penstock.cli.layers import SettingLayers, read_environment, read_file, with_variable
from penstock.cli.refused import REFUSED_OPTIONS, refuse_flags
from penstock.cli.setting import Range
from penstock.cli.settings import ServeSettings, engine_config
from penstock.core.errors import StartupError
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig, validate_engine_config


def _parse(argv: list[str], environ: dict[str, str] | None = None) -> ServeSettings:
    app = App(result_action="return_value")

    @app.command(config=SettingLayers(environ=environ or {}))
    def serve(model: str | None = None, *, settings: ServeSettings | None = None) -> ServeSettings:
        return settings or ServeSettings()

    result: ServeSettings = app(["serve", *argv], exit_on_error=False, print_error=False)
    return result


def _error_text(argv: list[str], environ: dict[str, str] | None = None) -> str:
    with pytest.raises(CycloptsError) as caught:
        _parse(argv, environ)
    caught.value.verbose = False
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "serve.toml"
    path.write_text("port = 1001\nmax-num-seqs = 11\nenable_prefix_caching = false\n")
    return path


def test_nothing_said_gives_the_defaults() -> None:
    assert _parse([]) == ServeSettings()


def test_a_file_overrides_defaults(file: Path) -> None:
    settings = _parse(["--config", str(file)])
    assert (settings.port, settings.max_num_seqs, settings.enable_prefix_caching) == (1001, 11, False)


def test_the_environment_overrides_the_file(file: Path) -> None:
    settings = _parse(["--config", str(file)], {"PENSTOCK_PORT": "1002"})
    assert (settings.port, settings.max_num_seqs) == (1002, 11)


def test_flags_override_all(file: Path) -> None:
    settings = _parse(["--config", str(file), "--port", "1003"], {"PENSTOCK_PORT": "1002"})
    assert settings.port == 1003


def test_the_environment_may_name_the_file(file: Path) -> None:
    assert _parse([], {"PENSTOCK_CONFIG": str(file)}).port == 1001


def test_a_yaml_file_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("port: 1004\nkernels: reference\n")
    settings = _parse(["--config", str(path)])
    assert (settings.port, settings.kernels) == (1004, "reference")


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ServeSettings().port = 1  # type: ignore[misc]  # the point of the test


def test_an_unknown_key_in_a_file_is_refused_with_the_file_named(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text("portt = 1\n")
    text = _error_text(["--config", str(path)])
    assert "portt" in text
    assert "serve.toml" in text


def test_an_unknown_variable_is_refused() -> None:
    assert "max_sequences" in _error_text([], {"PENSTOCK_MAX_SEQUENCES": "3"})


def test_service_links_of_kubernetes_are_not_ours() -> None:
    environ = {"PENSTOCK_PORT": "tcp://10.0.0.1:80", "PENSTOCK_SERVICE_HOST": "10.0.0.1", "OTHER": "1"}
    assert read_environment(environ) == {}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max-num-seqs", "0"], ("--max-num-seqs", '"0"', "between 1 and 4096")),
        (["--block-size", "17"], ("--block-size", '"17"', "power of two")),
        (["--port", "99999"], ("--port", "65535")),
        (["--dtype", "int8"], ("--dtype", "int8", "bfloat16")),
        (["--shutdown-timeout", "nan"], ("--shutdown-timeout", "86400")),
        (["--tensor-parallel-size", "65"], ("--tensor-parallel-size", '"65"')),
        (["--max-num-seqs", "many"], ("--max-num-seqs", "many")),
    ],
)
def test_a_bad_value_is_refused_with_field_value_and_limit(argv: list[str], words: tuple[str, ...]) -> None:
    text = _error_text(argv)
    assert all(word in text for word in words), text


def test_a_bad_value_in_the_environment_is_refused_too() -> None:
    text = _error_text([], {"PENSTOCK_MAX_NUM_SEQS": "5000"})
    assert "between 1 and 4096" in text
    assert "PENSTOCK_MAX_NUM_SEQS" in text


@pytest.mark.parametrize("name", ["PENSTOCK_ISA", "PENSTOCK_MAX_SEQUENCES", "PENSTOCK_QUANTIZATION"])
def test_an_error_names_the_variable_at_fault_and_no_other(name: str) -> None:
    text = _error_text([], {"PENSTOCK_PORT": "1002", name: "wrong"})
    assert name in text
    assert "PENSTOCK_PORT" not in text


def test_an_error_found_after_parsing_names_the_variable_unless_a_flag_decided() -> None:
    error = StartupError("max_num_batched_tokens is 2, it must be more", param="max_num_batched_tokens")
    environ = {"PENSTOCK_MAX_NUM_BATCHED_TOKENS": "2"}
    told = "max_num_batched_tokens is 2, it must be more (set by PENSTOCK_MAX_NUM_BATCHED_TOKENS)"
    assert with_variable(error, argv=["serve"], environ=environ) == told
    for argv, known in ((["serve", "--max-num-batched-tokens=2"], environ), (["serve"], {})):
        assert with_variable(error, argv=argv, environ=known) == error.message


@pytest.mark.parametrize("content", ["[1, 2]", "a: b: c", "\x00"])
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(content)
    with pytest.raises(StartupError) as caught:
        read_file(path)
    assert "config" in caught.value.message
    assert "\n" not in caught.value.message


def test_a_missing_file_and_a_file_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="No such file"):
        read_file(tmp_path / "none.toml")
    with pytest.raises(StartupError, match=r"must end with \.toml"):
        read_file(tmp_path / "serve.json")


@pytest.mark.parametrize("name", sorted(REFUSED_OPTIONS))
def test_every_refused_option_is_refused_as_a_flag(name: str) -> None:
    with pytest.raises(StartupError, match=f"^{name} is not supported: "):
        refuse_flags(["model", f"--{name.replace('_', '-')}=x"])


def test_a_refused_option_is_refused_in_a_file_and_in_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text('load_format = "gguf"\n')
    with pytest.raises(StartupError, match=r"load_format .*serve\.toml"):
        _parse(["--config", str(path)])
    with pytest.raises(StartupError, match=r"swap_space .*environment"):
        _parse([], {"PENSTOCK_SWAP_SPACE": "1"})


def test_no_setting_is_refused_and_offered_at_once() -> None:
    assert not {field.name for field in dataclasses.fields(ServeSettings)} & set(REFUSED_OPTIONS)


@pytest.mark.parametrize("field", dataclasses.fields(ServeSettings), ids=lambda field: field.name)
def test_every_setting_has_a_sentence_and_every_number_a_range(field: "dataclasses.Field[Any]") -> None:
    hint = get_type_hints(ServeSettings, include_extras=True)[field.name]
    parameter = next(extra for extra in hint.__metadata__ if isinstance(extra, Parameter))
    assert parameter.help
    assert parameter.help.endswith(".")
    kinds = set(get_args(hint.__origin__)) or {hint.__origin__}
    if kinds & {int, float}:
        assert any(isinstance(check, Range) for check in parameter.validator)


def test_engine_defaults_and_setting_defaults_agree() -> None:
    config = engine_config(ServeSettings(), model_path=Path("x"), model_revision="r")
    assert config == EngineConfig(
        model_path="x", model_revision="r", scheduler=SchedulerConfig(), kv=KvConfig()
    )


def test_every_engine_field_is_set_from_the_settings() -> None:
    settings = ServeSettings(
        dtype="float32",
        kernels="reference",
        quantization="int4",
        quantization_group_size=64,
        quantization_activations="bf16",
        kv_cache_dtype="int8",
        deterministic=True,
        thread_affinity="0-1",
        isa="avx2",
        num_threads=3,
        log_level="debug",
        device="cpu",
        enforce_eager=True,
        max_model_len=77,
        tensor_parallel_size=2,
        max_num_seqs=5,
        max_num_batched_tokens=55,
        step_time_target_ms=9.0,
        decode_stretch=3.0,
        max_num_queued_reqs=4,
        max_num_queued_tokens=44,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        enable_jump_forward=False,
        async_scheduling=True,
        scheduling_policy="fcfs",
        block_size=8,
        num_kv_blocks=99,
        kv_cache_memory_bytes=1234,
        kv_offloading_size=0.5,
        gpu_memory_utilization=0.5,
        speculative_config={"method": "ngram"},
        enable_lora=True,
        lora_modules=("french=adapters/french",),
        max_loras=3,
        max_lora_rank=5,
        max_cpu_loras=7,
        lora_memory_bytes=12345,
    )
    config = engine_config(settings, model_path=Path("x"), model_revision="r")
    plain = EngineConfig(model_path="x", model_revision="r")
    same = {"model_path", "model_revision", "warmup", "scheduler", "kv", "lora"}
    assert all(
        getattr(config, f) != getattr(plain, f) for f in EngineConfig.__struct_fields__ if f not in same
    )
    unset = {"max_model_len", "max_preemptions"}  # taken from the model; not offered
    for part, default, skip in (
        (config.scheduler, plain.scheduler, unset),
        (config.kv, plain.kv, set[str]()),
        (config.lora, plain.lora, set[str]()),
    ):
        changed = {f for f in part.__struct_fields__ if getattr(part, f) != getattr(default, f)}
        assert changed == set(part.__struct_fields__) - skip


def test_the_largest_and_smallest_legal_settings_pass_the_engine_too() -> None:
    validate_engine_config(
        engine_config(
            ServeSettings(max_num_seqs=1, max_num_batched_tokens=1, block_size=1, num_kv_blocks=2),
            model_path=Path("x"),
            model_revision="",
        )
    )


@pytest.mark.parametrize(
    ("high", "text"), [(1 << 20, "1048576"), (1 << 50, "1125899906842624"), (0.5, "0.5"), (2.0, "2")]
)
def test_a_range_is_told_with_all_its_digits(high: float, text: str) -> None:
    assert str(Range(low=0, high=high)) == f"between 0 and {text}"
