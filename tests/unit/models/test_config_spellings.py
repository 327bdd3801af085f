"""Configs of several generations say the same in different words."""

from typing import Any

import pytest

from penstock.core.errors import CheckpointError, UnsupportedModelError
from penstock.layers.rope import Llama3Scaling, LongRopeScaling, NoScaling, RopeSpec, YarnScaling
from penstock.models import gemma2, gemma3, gpt2, llama, mistral, phi3, qwen2, qwen3_moe
from penstock.models.config import ConfigReader

SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}


def reader(**fields: Any) -> ConfigReader:
    return ConfigReader({**SIZES, **fields}, source="config.json")


def test_llama3_rope_in_the_old_and_the_new_spelling() -> None:
    old = reader(rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    new = reader(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=16)
    expected = RopeSpec(theta=5e5, rotary_dim=4, scaling=scaling)
    assert llama.read_config(old).rope == llama.read_config(new).rope == expected


def test_gemma3_ropes_in_the_old_and_the_new_spelling() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    old = gemma3.read_config(reader(rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=linear))
    both = {"full_attention": {**linear, "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    new = gemma3.read_config(reader(rope_parameters=both))
    assert (old.full_rope, old.sliding_rope) == (new.full_rope, new.sliding_rope)
    assert old.sliding_rope.scaling == NoScaling()


@pytest.mark.parametrize("word", ["longrope", "su", "yarn"])
@pytest.mark.parametrize(("served", "factors"), [(16, (1.0, 2.0)), (17, (3.0, 4.0)), (None, (3.0, 4.0))])
def test_longrope_under_its_three_names_takes_its_factors_by_the_served_context(
    word: str, served: int | None, factors: tuple[float, float]
) -> None:
    config = reader(rope_scaling={"type": word, **LONG}, original_max_position_embeddings=16)
    scaling = phi3.read_config(config, served_max_len=served).rope.scaling
    assert isinstance(scaling, LongRopeScaling)
    assert scaling.factors == factors
    assert scaling.attention_factor == pytest.approx((1 + 2 * 0.6931 / 2.7726) ** 0.5, abs=1e-4)


def test_yarn_reads_its_own_attention_factor_or_derives_it() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    derived = llama.read_config(reader(rope_scaling=yarn)).rope.scaling
    given = llama.read_config(reader(rope_scaling={**yarn, "attention_factor": 1.5})).rope.scaling
    assert isinstance(derived, YarnScaling)
    assert derived.attention_factor == pytest.approx(1.1386, abs=1e-4)
    assert given.attention_factor == 1.5


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"type": "longrope", **LONG, "short_factor": [1.0]},
            "field 'short_factor' is [1.0], expected a list of 2 numbers",
        ),
        (
            {"type": "llama3", **LLAMA3, "high_freq_factor": 0.5},
            "expected a number above low_freq_factor (1)",
        ),
        ({"type": "default", "partial_rotary_factor": 0.8}, "expected an even share of head_dim (4)"),
        ({"type": "yarn", "factor": 0}, "field 'factor' is 0"),
    ],
)
def test_rope_fields_out_of_range_are_named(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        llama.read_config(reader(rope_scaling=rope))
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({}, (None,) * 4),
        ({"sliding_window": 8, "max_window_layers": 2}, (None,) * 4),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, (None, None, None, 8)),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
            },
            (None, 8, None, 8),
        ),
    ],
)
def test_qwen2_windows_by_rule_or_by_list(fields: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert qwen2.read_config(reader(**fields)).layer_windows == windows


@pytest.mark.parametrize(
    ("kinds", "window"), [(["full_attention"], 8), (["full"] * 4, 8), (["sliding_attention"] * 4, None)]
)
def test_layer_types_that_do_not_fit_are_refused(kinds: list[str], window: int | None) -> None:
    with pytest.raises(CheckpointError, match=r"layer_types|sliding_window"):
        gemma2.read_config(reader(layer_types=kinds, sliding_window=window))


def test_gemma_windows_follow_the_pattern_of_their_generation() -> None:
    assert gemma2.read_config(reader(sliding_window=8)).layer_windows == (8, None, 8, None)
    assert gemma3.read_config(reader(sliding_window=8, sliding_window_pattern=2)).layer_windows == (
        8,
        None,
        8,
        None,
    )
    assert gemma3.read_config(reader(sliding_window=8)).layer_windows == (8, 8, 8, 8)


def test_qwen3_moe_dense_layers_by_step_and_list() -> None:
    config = qwen3_moe.read_config(
        reader(decoder_sparse_step=2, mlp_only_layers=[1], num_experts=4, num_experts_per_tok=2)
    )
    assert config.dense_layers == {0, 1, 2}


@pytest.mark.parametrize(
    ("read", "fields"),
    [
        (gpt2.read_config, {"activation_function": "relu"}),
        (gpt2.read_config, {"add_cross_attention": True}),
        (gemma2.read_config, {"use_bidirectional_attention": True}),
        (gemma3.read_config, {"attn_logit_softcapping": 50.0}),
        (qwen3_moe.read_config, {"hidden_act": "gelu"}),
        (mistral.read_config, {"layer_types": ["sliding_attention"] * 4}),
    ],
)
def test_options_that_are_not_built_are_refused_by_name(read: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=next(iter(fields))):
        read(reader(**fields))
