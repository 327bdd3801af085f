"""AWQ and GPTQ: what their words mean, value by value, and which of them the kernels take over as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.core.errors import CheckpointError, UnsupportedModelError
from penstock.kernels.quantization import ROUNDED_METHODS
from penstock.kernels.rounded import RoundedWeight
from tests.unit.quantized.stored_case import MODULE, matrix_of, nibbles, source_of
from tools.quantized.forms import FORMS

SHAPE = (24, 128)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def random_words(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(torch.int32)


def random_scales(*shape: int) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(9)) + 0.5).to(torch.float16)


def awq_tensors(rows: int = SHAPE[0], cols: int = SHAPE[1]) -> dict[str, Tensor]:
    return {
        ".qweight": random_words(cols, rows // 8, seed=1),
        ".qzeros": random_words(cols // 32, rows // 8, seed=2),
        ".scales": random_scales(cols // 32, rows),
    }


def gptq_tensors(rows: int = SHAPE[0], cols: int = SHAPE[1]) -> dict[str, Tensor]:
    return {
        ".qweight": random_words(cols // 8, rows, seed=1),
        ".qzeros": random_words(cols // 32, rows // 8, seed=2),
        ".scales": random_scales(cols // 32, rows),
        ".g_idx": (torch.arange(cols) // 32).to(torch.int32),
    }


def test_awq_words_mean_what_autoawq_packs(tmp_path: Path) -> None:
    """Nibble j of word c is output 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[j].

    **Source:** AutoAWQ, `WQLinear_GEMM.from_linear`.
    """
    tensors = awq_tensors()
    values, zeros = nibbles(tensors[".qweight"]), nibbles(tensors[".qzeros"])
    expected = torch.empty(SHAPE)
    for i in range(SHAPE[1]):
        for word in range(SHAPE[0] // 8):
            for j, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                o, g = 8 * word + output, i // 32
                shifted = values[i][word][j] - zeros[g][word][j]
                expected[o, i] = shifted * float(tensors[".scales"][g, o])
    got = matrix_of(tmp_path, tensors, AWQ, shape=SHAPE).read(torch.float32, fill=True)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("layout", "offset"), [("gptq", 1), ("gptq_v2", 0)])
@pytest.mark.parametrize("has_act_order", [False, True])
def test_gptq_words_mean_what_gptqmodel_packs(
    layout: str, offset: int, has_act_order: bool, tmp_path: Path
) -> None:
    """Nibble j of word r is input 8 r + j; the first layout keeps zero points less one.

    **Source:** GPTQModel, `TorchQuantLinear.pack` and `dequantize_weight`.
    """
    tensors = gptq_tensors()
    if has_act_order:
        shuffled = torch.randperm(SHAPE[1], generator=torch.Generator().manual_seed(3))
        tensors[".g_idx"] = tensors[".g_idx"][shuffled]
    values, zeros = nibbles(tensors[".qweight"]), nibbles(tensors[".qzeros"])
    expected = torch.empty(SHAPE)
    for i in range(SHAPE[1]):
        g = int(tensors[".g_idx"][i])
        for o in range(SHAPE[0]):
            zero = zeros[g][o // 8][o % 8] + offset
            expected[o, i] = (values[i // 8][o][i % 8] - zero) * float(tensors[".scales"][g, o])
    section = {**GPTQ, "checkpoint_format": layout, "desc_act": has_act_order}
    got = matrix_of(tmp_path, tensors, section, shape=SHAPE)
    assert torch.equal(got.read(torch.float32, fill=True), expected)
    assert isinstance(got.kept(torch.float32, methods=ROUNDED_METHODS), Tensor)


@pytest.mark.parametrize("form", [name for name in FORMS if name.startswith(("awq", "gptq"))])
def test_a_written_weight_is_read_as_what_it_stands_for(form: str, tmp_path: Path) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    written = FORMS[form].write(weight)
    matrix = matrix_of(tmp_path, dict(written.tensors), dict(FORMS[form].section), shape=SHAPE)
    assert torch.equal(matrix.read(torch.float32, fill=True), written.stands_for)
    assert torch.equal(matrix.read(torch.bfloat16, fill=True), written.stands_for.bfloat16())
    assert matrix.num_bytes == sum(tensor.nbytes for tensor in written.tensors.values())
    assert (written.stands_for - weight).abs().max() < 0.5


EXACT = {
    "awq-g64-symmetric": "int4, groups of 64, activations bf16",
    "gptq-g128": "int4, groups of 128, activations bf16",
    "gptq-g32": "int4, groups of 32, activations bf16",
    "gptq-all-inputs": "int4, groups of 128, activations bf16",
    "gptq-v2-g64": "int4, groups of 64, activations bf16",
    "gptq-int8-all-inputs": "int8, activations bf16",
}


@pytest.mark.parametrize("form", EXACT)
def test_a_grid_of_the_kernels_is_kept_without_a_rounding(form: str, tmp_path: Path) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(6))
    written = FORMS[form].write(weight)
    kept = matrix_of(tmp_path, dict(written.tensors), dict(FORMS[form].section), shape=SHAPE).kept(
        torch.bfloat16, methods=ROUNDED_METHODS
    )
    assert isinstance(kept, RoundedWeight)
    assert str(kept.quantization) == EXACT[form]
    assert torch.equal(kept.dequantized(), written.stands_for)


@pytest.mark.parametrize("form", ["awq-g32", "gptq-g32-asymmetric", "gptq-g32-act-order", "gptq-int8-g32"])
def test_any_other_grid_is_dequantized(form: str, tmp_path: Path) -> None:
    written = FORMS[form].write(torch.randn(SHAPE, generator=torch.Generator().manual_seed(7)))
    matrix = matrix_of(tmp_path, dict(written.tensors), dict(FORMS[form].section), shape=SHAPE)
    kept = matrix.kept(torch.float32, methods=ROUNDED_METHODS)
    assert isinstance(kept, Tensor)
    assert torch.equal(kept, written.stands_for)


def test_a_scale_that_float16_cannot_hold_is_not_rounded_again(tmp_path: Path) -> None:
    tensors = gptq_tensors()
    tensors[".qzeros"].fill_(0x77777777)
    tensors[".scales"] = torch.full((4, SHAPE[0]), 2.0**-20 * 1.0078125, dtype=torch.bfloat16)
    kept = matrix_of(tmp_path, tensors, GPTQ, shape=SHAPE).kept(torch.float32, methods=ROUNDED_METHODS)
    assert isinstance(kept, Tensor)


def test_a_module_is_one_weight_beside_the_plain_tensors(tmp_path: Path) -> None:
    source = source_of(tmp_path, gptq_tensors(), GPTQ)
    assert set(source) == {f"{MODULE}.weight", "model.norm.weight"}
    assert f"{MODULE}.weight" in source
    assert f"{MODULE}.qweight" not in source
    assert source.is_quantized(f"{MODULE}.weight")
    assert not source.is_quantized("model.norm.weight")
    assert source.find("model.norm.weight", shape=(4,)).read(torch.float32, fill=True).tolist() == [1] * 4


BROKEN: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no scales": (
        {".scales": None},
        "tensor 'model.layers.0.mlp.up_proj.scales' of shape [4, 24] is missing",
    ),
    "short words": ({".qweight": random_words(15, 24, seed=1)}, "expected shape [16, 24], found [15, 24]"),
    "words of another type": (
        {".qweight": torch.zeros(16, 24, dtype=torch.int64)},
        "expected dtype I32, found I64",
    ),
    "float zeros": ({".qzeros": torch.zeros(4, 3)}, "expected dtype I32, found F32"),
    "too few groups": ({".scales": random_scales(3, 24)}, "expected shape [4, 24], found [3, 24]"),
    "a group that is not there": (
        {".g_idx": torch.full((128,), 4, dtype=torch.int32)},
        "holds groups from 4 to 4, there are 0 to 3",
    ),
    "a group below 0": ({".g_idx": torch.full((128,), -1, dtype=torch.int32)}, "holds groups from -1 to -1"),
    "short groups": ({".g_idx": torch.zeros(127, dtype=torch.int32)}, "expected shape [128], found [127]"),
    "a scale of NaN": ({".scales": random_scales(4, 24) * float("nan")}, "holds infinity or NaN"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_module_is_refused_by_its_tensor(what: str, tmp_path: Path) -> None:
    change, message = BROKEN[what]
    tensors = {suffix: each for suffix, each in {**gptq_tensors(), **change}.items() if each is not None}
    with pytest.raises(CheckpointError) as caught:
        matrix_of(tmp_path, tensors, GPTQ, shape=SHAPE).read(torch.float32, fill=True)
    assert message in caught.value.message
    assert MODULE in caught.value.message


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"quant_method": "aqlm"}, "'quant_method' is 'aqlm', which is not supported; known: awq, gptq"),
        ({"quant_method": None}, "'quant_method' is ''"),
        ({**GPTQ, "bits": 3}, "field 'bits' is 3, which is not supported; known: 4, 8"),
        ({**GPTQ, "bits": True}, "field 'bits' is True"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "'marlin', which is not supported; known: gptq, gptq_v2"),
        ({**GPTQ, "is_marlin_format": True}, "field 'is_marlin_format' is True"),
        ({**GPTQ, "dynamic": {"+:.*": {"bits": 8}}}, "field 'dynamic' is"),
        ({**AWQ, "bits": 8}, "field 'bits' is 8, which is not supported; known: 4"),
        ({**AWQ, "version": "gemv"}, "field 'version' is 'gemv', which is not supported; known: gemm"),
    ],
)
def test_what_is_not_built_is_refused_with_what_is(
    section: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        source_of(tmp_path, gptq_tensors(), section)
    assert message in caught.value.message


SIZES = (0, 1, -2, "32", 1.5, 1 << 40)


@pytest.mark.parametrize(
    ("method", "size"), [("gptq", None), *((m, s) for m in ("awq", "gptq") for s in SIZES)]
)
def test_a_group_size_out_of_range_is_refused(method: str, size: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="group_size"):
        source_of(tmp_path, gptq_tensors(), {"quant_method": method, "bits": 4, "group_size": size})


@pytest.mark.parametrize(
    ("shape", "message"), [((20, 128), "does not divide its 20"), ((24, 100), "its 100")]
)
def test_a_weight_that_cannot_be_packed_so_is_refused(
    shape: tuple[int, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        matrix_of(tmp_path, awq_tensors(), AWQ, shape=shape)
