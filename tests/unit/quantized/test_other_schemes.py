"""compressed-tensors, 8-bit floats and bitsandbytes: what their tensors mean, and what is refused."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.core.errors import CheckpointError, UnsupportedModelError
from penstock.kernels.quantization import INTEGER_METHODS, ROUNDED_METHODS
from penstock.kernels.rounded import RoundedWeight
from penstock.models.checkpoint import RAW_DTYPES
from tests.unit.quantized.stored_case import MODULE, matrix_of, source_of
from tools.quantized.forms import FORMS

SHAPE = (24, 128)
"""Within one block of 128 x 128."""
FIXTURES = json.loads((Path(__file__).parent / "written_by_others.json").read_text())
OTHERS = [name for name in FORMS if not name.startswith(("awq", "gptq"))]
EXACT = {
    "w4a16-g128": "int4, groups of 128, activations bf16",
    "w8a8": "int8, activations int8",
    "bitsandbytes-int8": "int8, activations bf16",
    "fp8-tensor": "fp8, activations bf16",
    "fp8-channel": "fp8, activations bf16",
    "fp8-dynamic": "fp8, activations fp8",
    "fp8-block": "fp8, activations bf16",
    "fp8-block-inverse": "fp8, activations fp8",
}


def decode(fields: dict[str, Any]) -> Tensor:
    raw = torch.tensor(list(base64.b64decode(fields["data"])), dtype=torch.uint8)
    return raw.view(RAW_DTYPES[fields["dtype"]]).view(fields["shape"])


@pytest.mark.parametrize("name", FIXTURES)
def test_a_weight_is_read_as_its_own_library_reads_it(name: str, tmp_path: Path) -> None:
    """The tensors and the result were written by bitsandbytes 0.50.2 and compressed-tensors 0.20.0."""
    case = FIXTURES[name]
    expected = decode(case["dequantized"])
    tensors = {suffix: decode(fields) for suffix, fields in case["tensors"].items()}
    matrix = matrix_of(tmp_path, tensors, case["section"], shape=(16, 64))
    assert torch.equal(matrix.read(torch.float32, fill=True), expected)


@pytest.mark.parametrize("form", OTHERS)
def test_a_written_weight_is_read_as_what_it_stands_for(form: str, tmp_path: Path) -> None:
    """And kept with its integers and scales exactly where the kernels have such a grid."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    written = FORMS[form].write(weight)
    matrix = matrix_of(tmp_path, dict(written.tensors), dict(FORMS[form].section), shape=SHAPE)
    assert torch.equal(matrix.read(torch.float32, fill=True), written.stands_for)
    kept = matrix.kept(torch.float32, methods=ROUNDED_METHODS)
    assert isinstance(kept, RoundedWeight) is (form in EXACT)
    if isinstance(kept, RoundedWeight):
        assert str(kept.quantization) == EXACT[form]
        assert torch.equal(kept.dequantized(), written.stands_for)
    assert matrix.num_bytes == sum(tensor.nbytes for tensor in written.tensors.values())
    assert (written.stands_for - weight).abs().max() < 0.6


def test_floats_are_kept_only_where_the_kernels_multiply_them(tmp_path: Path) -> None:
    """Homes without such products get what the weight stands for."""
    written = FORMS["fp8-channel"].write(torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)))
    matrix = matrix_of(tmp_path, dict(written.tensors), dict(FORMS["fp8-channel"].section), shape=SHAPE)
    assert torch.equal(matrix.kept(torch.float32, methods=INTEGER_METHODS), written.stands_for)


@pytest.mark.parametrize("bits", [0x7F, 0xFF])
def test_kept_floats_are_numbers(bits: int, tmp_path: Path) -> None:
    """Both NaN patterns are found; the largest number, one bit less, is none."""
    values = torch.zeros(SHAPE, dtype=torch.uint8)
    values[3, 5] = bits
    tensors = {".weight": values.view(torch.float8_e4m3fn), ".weight_scale": torch.ones(1)}
    section = {"quant_method": "fp8", "activation_scheme": "static"}
    with pytest.raises(CheckpointError, match="holds NaN"):
        matrix_of(tmp_path, tensors, section, shape=SHAPE).kept(torch.bfloat16, methods=ROUNDED_METHODS)
    values[3, 5] = bits - 1
    kept = matrix_of(tmp_path, tensors, section, shape=SHAPE).kept(torch.bfloat16, methods=ROUNDED_METHODS)
    assert isinstance(kept, RoundedWeight)
    assert str(kept.quantization) == "fp8, activations fp8"
    assert abs(float(kept.dequantized()[3, 5])) == 448.0


def test_a_scale_that_makes_products_infinite_is_refused(tmp_path: Path) -> None:
    tensors = {
        ".weight": torch.full(SHAPE, 448.0).to(torch.float8_e4m3fn),
        ".weight_scale": torch.tensor([1e37]),
    }
    matrix = matrix_of(tmp_path, tensors, {"quant_method": "fp8"}, shape=SHAPE)
    with pytest.raises(CheckpointError, match="is infinite"):
        matrix.kept(torch.bfloat16, methods=ROUNDED_METHODS)


def test_blocks_of_floats_may_end_inside_the_weight(tmp_path: Path) -> None:
    """24 x 200 in blocks of 16 x 128: value by value; rows with two scales are never kept."""
    values = torch.randn(24, 200, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2, generator=torch.Generator().manual_seed(2))
    section = {"quant_method": "fp8", "weight_block_size": [16, 128]}
    tensors = {".weight": values, ".weight_scale_inv": scales}
    matrix = matrix_of(tmp_path, tensors, section, shape=(24, 200))
    got = matrix.read(torch.float32, fill=True)
    assert torch.equal(matrix.kept(torch.float32, methods=ROUNDED_METHODS), got)
    for o in range(24):
        for i in range(0, 200, 13):
            assert float(got[o, i]) == float(values[o, i].float() * scales[o // 16, i // 128])


def test_a_modules_name_comes_before_a_pattern_and_that_before_linear(tmp_path: Path) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    written = FORMS["w8a8"].write(weight)
    eight = FORMS["w8a8"].section["config_groups"]["group_0"]
    four = FORMS["w4a16-g128"].section["config_groups"]["group_0"]
    for targets in ([MODULE], ["re:.*up_proj$"], ["Linear"]):
        groups = {"other": {**four, "targets": ["re:.*down_proj$"]}, "this": {**eight, "targets": targets}}
        if targets != ["Linear"]:
            groups["all"] = {**four, "targets": ["Linear"]}
        section = {**FORMS["w8a8"].section, "config_groups": groups}
        matrix = matrix_of(tmp_path, dict(written.tensors), section, shape=SHAPE)
        assert torch.equal(matrix.read(torch.float32, fill=True), written.stands_for)


BROKEN: dict[str, tuple[str, dict[str, Tensor | None], str]] = {
    "a packed shape that lies": (
        "w4a16-g128", {".weight_shape": torch.tensor([24, 127])}, "says [24, 127], expected [24, 128]",
    ),
    "no packed words": ("w4a16-g128", {".weight_packed": None}, "up_proj.weight' of shape [24, 128] is missing"),
    "no zero points": ("w4a16-g32-asymmetric", {".weight_zero_point": None}, "weight_zero_point' of shape [3, 4]"),
    "scales of another shape": ("w8a8", {".weight_scale": torch.ones(23, 1)}, "expected shape [24, 1]"),
    "a scale of infinity": (
        "w8a8", {".weight_scale": torch.full((24, 1), float("inf"))}, "holds infinity or NaN",
    ),
    "integers of another type": ("w8a8", {".weight": torch.zeros(24, 128)}, "expected dtype I8, found F32"),
    "floats that are NaN": (
        "fp8-tensor", {".weight": torch.full(SHAPE, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)}, "holds NaN",
    ),
    "blocks that do not cover": ("fp8-block", {".weight_scale": torch.ones(1, 2)}, "expected shape [1, 1]"),
    "half of the nibbles": (
        "nf4", {".weight": torch.zeros(767, 1, dtype=torch.uint8)}, "expected shape [1536, 1], found [767, 1]",
    ),
    "too few factors": ("nf4", {".weight.absmax": torch.ones(47)}, "expected shape [48], found [47]"),
    "a short table": ("nf4", {".weight.quant_map": torch.ones(15)}, "expected shape [16], found [15]"),
    "no outer factors": (
        "nf4-nested", {".weight.nested_absmax": torch.ones(2)}, "expected shape [1], found [2]",
    ),
    "another layout of int8": (
        "bitsandbytes-int8", {".weight_format": torch.tensor(1, dtype=torch.uint8)}, "only 0 (row) is read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_module_is_refused_by_its_tensor(what: str, tmp_path: Path) -> None:
    form, change, message = BROKEN[what]
    written = FORMS[form].write(torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)))
    tensors = {suffix: each for suffix, each in {**written.tensors, **change}.items() if each is not None}
    with pytest.raises(CheckpointError) as caught:
        matrix_of(tmp_path, tensors, dict(FORMS[form].section), shape=SHAPE).read(torch.float32, fill=True)
    assert message in caught.value.message
    assert MODULE in caught.value.message


STATE = ".weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (b"{", "is no JSON"),
        (b"[1]", "is no JSON object"),
        (b"\xff", "is no JSON"),
        (b"[" * 4000, "is no JSON"),
        (b" " * 5000, "has 5000 bytes, at most 4096 are read"),
        ({"blocksize": 0}, "field 'blocksize' is 0"),
        ({"blocksize": 1 << 40}, "field 'blocksize'"),
        ({"shape": [128, 24]}, "field 'shape' is [128, 24], expected [24, 128]"),
        ({"quant_type": "fp4"}, "field 'quant_type' is 'fp4'"),
        ({"shape": "no"}, "field 'shape' is 'no'"),
    ],
)
def test_a_broken_quant_state_is_refused_by_its_field(state: Any, message: str, tmp_path: Path) -> None:
    tensors = dict(FORMS["nf4"].write(torch.randn(SHAPE)).tensors)
    if isinstance(state, dict):
        state = json.dumps(json.loads(bytes(tensors[STATE].tolist())) | state).encode()
    tensors[STATE] = torch.tensor(list(state), dtype=torch.uint8)
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        matrix_of(tmp_path, tensors, dict(FORMS["nf4"].section), shape=SHAPE)
    assert message in caught.value.message


COMPRESSED = dict(FORMS["w8a8"].section)
GROUP = COMPRESSED["config_groups"]["group_0"]


def with_weights(**fields: Any) -> dict[str, Any]:
    return {**COMPRESSED, "config_groups": {"g": {**GROUP, "weights": {**GROUP["weights"], **fields}}}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({**COMPRESSED, "format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized', which is not supported"),
        ({**COMPRESSED, "kv_cache_scheme": {"num_bits": 8}}, "field 'kv_cache_scheme'"),
        ({**COMPRESSED, "transform_config": {"config_groups": {}}}, "field 'transform_config'"),
        ({**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask'"),
        ({**COMPRESSED, "config_groups": {}}, "expected an object of 1 to 64 objects"),
        ({**COMPRESSED, "config_groups": None}, "expected an object of 1 to 64 objects"),
        ({**COMPRESSED, "config_groups": {"g": 3}}, "field 'g' is 3, expected an object"),
        (with_weights(num_bits=2), "field 'num_bits' is 2, which is not supported; known: 4, 8"),
        (with_weights(strategy="token"), "field 'strategy' is 'token', which is not supported"),
        (with_weights(strategy="group", group_size=None), "field 'group_size' is None"),
        (with_weights(type="float", num_bits=4), "field 'num_bits' is 4, which is not supported; known: 8"),
        (with_weights(type="float", strategy="group"), "floats in groups are not supported; known: tensor"),
        (with_weights(dynamic=True), "field 'dynamic' is True"),
        (with_weights(strategy="block"), "field 'block_structure'"),
        ({**COMPRESSED, "config_groups": {"g": {**GROUP, "targets": "Linear"}}}, "field 'targets'"),
        ({**COMPRESSED, "config_groups": {"g": {**GROUP, "targets": ["re:("]}}}, "patterns that can be read"),
        ({**COMPRESSED, "config_groups": {"g": {**GROUP, "targets": ["re:(a+)+$"]}}}, "none of a group"),
        ({**COMPRESSED, "config_groups": {"g": {**GROUP, "targets": ["re:" + ".*" * 5]}}}, "at most 4 repeats"),
        ({**COMPRESSED, "config_groups": {"g": {**GROUP, "targets": ["x" * 201]}}}, "at most 200 characters"),
        ({"quant_method": "bitsandbytes"}, "field 'load_in_4bit' is False"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "'int4'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "two whole numbers from 1"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "two whole numbers from 1"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "field 'fmt' is 'e5m2'"),
    ],
)  # fmt: skip
def test_what_is_not_built_is_refused_with_what_is(
    section: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((UnsupportedModelError, CheckpointError)) as caught:
        source_of(tmp_path, {".weight": torch.zeros(2, 2)}, section)
    assert message in caught.value.message


def test_a_module_that_no_group_targets_is_refused(tmp_path: Path) -> None:
    tensors = dict(FORMS["w8a8"].write(torch.randn(SHAPE)).tensors)
    section = {**COMPRESSED, "config_groups": {"g": {**GROUP, "targets": ["re:.*down_proj"]}}}
    with pytest.raises(CheckpointError, match="no group of config_groups targets this module"):
        matrix_of(tmp_path, tensors, section, shape=SHAPE)
