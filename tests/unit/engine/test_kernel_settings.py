"""Settings of the kernels in the engine's config: what is read, and what is refused by name."""

import msgspec
import pytest

from penstock.core.errors import StartupError
from penstock.engine.config import EngineConfig, KvConfig, read_affinity, validate_engine_config
from penstock.engine.loading import kernel_options

PLAIN = EngineConfig(model_path="x")


@pytest.mark.parametrize(
    ("text", "cpus"), [(None, ()), ("0-1", (0, 1)), ("3", (3,)), ("0-2,8", (0, 1, 2, 8)), ("1, 0", (1, 0))]
)
def test_an_affinity_is_a_list_of_cpus_and_ranges(text: str | None, cpus: tuple[int, ...]) -> None:
    assert read_affinity(text) == cpus


@pytest.mark.parametrize("text", ["", "a", "1-", "3-1", "0,,1", "-1", "5000", "0-99999"])
def test_what_is_no_affinity_is_refused(text: str) -> None:
    with pytest.raises(StartupError, match="thread_affinity is") as caught:
        validate_engine_config(msgspec.structs.replace(PLAIN, thread_affinity=text))
    assert caught.value.param == "thread_affinity"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization": "awq"}, "quantization is 'awq', it must be one of none, int8, int4"),
        ({"quantization": "int4", "quantization_group_size": 48}, "one of 32, 64, 128"),
        ({"quantization": "int8", "quantization_group_size": 32}, "needs quantization int4"),
        ({"quantization_activations": "bf16"}, "needs quantization int8, int4 or fp8"),
        ({"quantization": "int8", "quantization_activations": "fp8"}, "one of int8, bf16"),
        ({"isa": "neon"}, "isa is 'neon'"),
        ({"kv": KvConfig(cache_dtype="fp4")}, "kv_cache_dtype is 'fp4'"),
    ],
)
def test_an_option_that_would_be_ignored_or_is_unknown_is_refused(
    changes: dict[str, object], words: str
) -> None:
    with pytest.raises(StartupError, match=words):
        validate_engine_config(msgspec.structs.replace(PLAIN, **changes))


def test_every_setting_reaches_the_kernels() -> None:
    config = msgspec.structs.replace(
        PLAIN,
        quantization="int4",
        quantization_group_size=64,
        quantization_activations="bf16",
        thread_affinity="0-1",
        isa="avx2",
        deterministic=True,
        kv=KvConfig(block_size=32, cache_dtype="int8"),
    )
    options = kernel_options(config, num_threads=3)
    assert str(options.quantization) == "int4, groups of 64, activations bf16"
    assert (options.cpus, options.isa, options.is_deterministic) == ((0, 1), "avx2", True)
    assert (options.block_size, options.kv_cache_dtype, options.num_threads) == (32, "int8", 3)
