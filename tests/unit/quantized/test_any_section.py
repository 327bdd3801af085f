"""Whatever stands in `quantization_config`: a scheme, or a refusal in one line."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import StartupError
from penstock.models.config import ConfigReader
from penstock.models.quantized.select import METHODS, read_scheme

FIELDS = (
    "bits", "w_bit", "group_size", "q_group_size", "version", "checkpoint_format", "is_marlin_format", "dynamic",
    "pack_dtype", "format", "config_groups", "kv_cache_scheme", "transform_config", "sparsity_config", "fmt",
    "weight_block_size", "activation_scheme", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type",
)  # fmt: skip
GROUP_FIELDS = (
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "targets", "weights",
    "input_activations", "output_activations", "format",
)  # fmt: skip
WORDS = ("gptq", "gemm", "int", "float", "group", "channel", "block", "tensor", "Linear", "re:.*", "nf4", "x")
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 200), st.just(1 << 70), st.floats(), st.sampled_from(WORDS)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(GROUP_FIELDS), inner, max_size=5)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(METHODS)), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6))
def test_any_section_is_read_or_refused_by_name(method: str, fields: dict[str, Any]) -> None:
    reader = ConfigReader({"quantization_config": {**fields, "quant_method": method}}, source="config.json")
    label, refusal = "", "config.json: quantization_config"
    try:
        label = read_scheme(reader).label
    except StartupError as error:
        refusal = error.message
    assert label or "\n" not in refusal
    assert refusal.startswith("config.json: quantization_config")
