"""Every form that is written for tests and for the table of perplexities."""

from functools import partial
from typing import Any, Final

from tools.quantized.writers import Form, awq, gptq


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
}
"""By the name that `--form` takes."""
