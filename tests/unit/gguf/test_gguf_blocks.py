"""Block formats of GGUF: bit for bit what the `gguf` package makes of the same bytes."""

import gguf
import numpy as np
import pytest
import torch

from penstock.models.gguf.blocks import DEQUANTIZE, dequantize, q4_0_grid
from penstock.text.gguf.header import TYPES
from tools.quantized.ggml_blocks import quantize, type_for

KINDS = {kind.name: kind for kind in TYPES.values()}


@pytest.mark.parametrize("kind", DEQUANTIZE)
@pytest.mark.filterwarnings("ignore:.*encountered in")
def test_random_bytes_stand_for_what_ggml_says(kind: str) -> None:
    """Of 7 rows of 3 blocks, NaN and infinity in the scales included."""
    size = KINDS[kind].num_bytes
    raw = np.random.default_rng(3).integers(0, 256, (7, 3 * size), dtype=np.uint8)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    got = dequantize(kind, torch.from_numpy(raw), block_bytes=size).numpy()
    assert np.array_equal(got, expected, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_of_blocks_are_ggmls(kind: str) -> None:
    values, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert (KINDS[kind].values, KINDS[kind].num_bytes) == (values, num_bytes)
    assert (
        next(number for number, each in TYPES.items() if each.name == kind) == gguf.GGMLQuantizationType[kind]
    )


def test_q4_0_is_the_kernels_int4_in_groups_of_32() -> None:
    """The same integers and scales."""
    values = np.random.default_rng(3).standard_normal((5, 96)).astype(np.float32)
    raw = quantize(values, "Q4_0")
    rounded = q4_0_grid(torch.from_numpy(raw)).rounded("bf16")
    assert rounded is not None
    assert str(rounded.quantization) == "int4, groups of 32, activations bf16"
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(rounded.dequantized().numpy(), expected)


@pytest.mark.parametrize(("kind", "most_error"), [("Q4_K", 0.25), ("Q6_K", 0.08), ("Q8_0", 0.02)])
def test_the_writers_own_rounding_stays_close(kind: str, most_error: float) -> None:
    """Half a step of a run whose values reach about 4: so the packing of scales and values is right."""
    values = np.random.default_rng(3).standard_normal((4, 512)).astype(np.float32)
    meant = gguf.quants.dequantize(quantize(values, kind), gguf.GGMLQuantizationType[kind])
    assert np.abs(meant - values).max() < most_error
    assert type_for(kind, 512) == kind
