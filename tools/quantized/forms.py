"""Every form that is written for tests and for the table of perplexities."""

from functools import partial
from typing import Any, Final

from tools.quantized.writers import (
    Form,
    awq,
    bitsandbytes_int8,
    bitsandbytes_nf4,
    fp8,
    gptq,
    packed_integers,
    plain_integers,
)

TOKEN_INT8: Final = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
TOKEN_FP8: Final = TOKEN_INT8 | {"type": "float"}


def _awq(group_size: int, *, is_symmetric: bool = False) -> Form:
    section = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": not is_symmetric,
        "version": "gemm",
    }
    return Form(section=section, write=partial(awq, group_size=group_size, is_symmetric=is_symmetric))


def _gptq(group_size: int, *, layout: str = "gptq", **options: Any) -> Form:  # options of `gptq`
    section = {
        "quant_method": "gptq",
        "bits": options.get("bits", 4),
        "group_size": group_size,
        "desc_act": options.get("has_act_order", False),
        "sym": options.get("is_symmetric", True),
        "checkpoint_format": layout,
    }
    offset = int(layout == "gptq")
    return Form(section=section, write=partial(gptq, group_size=group_size, zero_offset=offset, **options))


def _compressed(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"dynamic": False, "symmetric": True} | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group | {"input_activations": inputs, "output_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def _w4a16(group_size: int, *, is_symmetric: bool = True) -> Form:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size}
    return Form(
        section=_compressed("pack-quantized", weights | {"symmetric": is_symmetric}),
        write=partial(packed_integers, group_size=group_size, is_symmetric=is_symmetric),
    )


def _w8a8(*, is_symmetric: bool = True) -> Form:
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": is_symmetric}
    return Form(
        section=_compressed("int-quantized", weights, TOKEN_INT8),
        write=partial(plain_integers, is_symmetric=is_symmetric),
    )


def _fp8(strategy: str, block: tuple[int, int] | None, inputs: dict[str, Any] | None = None) -> Form:
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = list(block or ())
    return Form(section=_compressed("float-quantized", weights, inputs), write=partial(fp8, block=block))


def _nf4(*, is_nested: bool) -> Form:
    section = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": is_nested,
    }
    return Form(section=section, write=partial(bitsandbytes_nf4, is_nested=is_nested))


FORMS: Final[dict[str, Form]] = {
    "awq-g128": _awq(128),
    "awq-g32": _awq(32),
    "awq-g64-symmetric": _awq(64, is_symmetric=True),
    "gptq-g128": _gptq(128),
    "gptq-g32": _gptq(32),
    "gptq-g32-asymmetric": _gptq(32, is_symmetric=False),
    "gptq-g32-act-order": _gptq(32, has_act_order=True),
    "gptq-all-inputs": _gptq(-1),
    "gptq-v2-g64": _gptq(64, layout="gptq_v2"),
    "gptq-int8-all-inputs": _gptq(-1, bits=8),
    "gptq-int8-g32": _gptq(32, bits=8),
    "w4a16-g128": _w4a16(128),
    "w4a16-g32-asymmetric": _w4a16(32, is_symmetric=False),
    "w8a8": _w8a8(),
    "w8a8-asymmetric": _w8a8(is_symmetric=False),
    "fp8-tensor": _fp8("tensor", None),
    "fp8-channel": _fp8("channel", (1, 0)),
    "fp8-dynamic": _fp8("channel", (1, 0), TOKEN_FP8),
    "fp8-block": _fp8("block", (128, 128)),
    "fp8-block-inverse": Form(
        section={"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        write=partial(fp8, block=(128, 128), suffix=".weight_scale_inv"),
    ),
    "nf4": _nf4(is_nested=False),
    "nf4-nested": _nf4(is_nested=True),
    "bitsandbytes-int8": Form(
        section={"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
        write=bitsandbytes_int8,
    ),
}
"""By the name that `--form` takes."""
