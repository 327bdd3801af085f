"""8-bit floats (e4m3) with a scale for the whole weight, for each output or for each block.

```
weight            [O, I] F8_E4M3
weight_scale      [1], [O, 1] or [O / a, I / b]         called weight_scale_inv in block-wise releases
w[o, i] = weight[o, i] * scale of its block
```

Homes that multiply 8-bit floats keep them as they are where a row has one scale: a scale for the weight is
one that all rows share. Where blocks cut the inputs a row has several, and to give it one would round most
values again: such a weight is dequantized. The native home has no products of 8-bit floats and dequantizes
all. Inputs are rounded with a scale a token where the format rounds them, whatever its own scales for them.
This is the scheme of checkpoints with `quant_method` `fp8`; `compressed_tensors` shares the matrix.

**Source:** Micikevicius et al., FP8 Formats for Deep Learning, 2022; DeepSeek-V3 Technical Report, 2024,
section 3.3.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from penstock.core.errors import CheckpointError
from penstock.kernels.quantization import Activations, Method, Quantization
from penstock.kernels.rounded import RoundedWeight
from penstock.models.checkpoint import Checkpoint
from penstock.models.config import ConfigReader
from penstock.models.quantized.packing import FLOATS, read_scales, stored_bytes, wrong_data
from penstock.models.quantized.scheme import WEIGHT

STATIC_INPUTS: Final = (".input_scale", ".activation_scale")
"""Fixed scales of inputs, measured by others beforehand; here each token has its own."""
FP8_MAX: Final = 448.0
NAN_BITS: Final = 0x7F
"""All bits of an e4m3 but the sign: the one pattern that is no number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Matrix:
    """A stored matrix; a `stored.StoredMatrix`."""

    files: Checkpoint
    module: str
    shape: tuple[int, int]
    scale_name: str
    scale_shape: tuple[int, ...]
    block: tuple[int, int]
    """Outputs and inputs that share a scale."""
    num_bytes: int
    activations: Activations = "bf16"
    """What the format does with the inputs of the product."""

    @property
    def has_row_scales(self) -> bool:
        """No row has two scales."""
        return self.block[1] >= self.shape[1]

    def read(self, dtype: torch.dtype, *, fill: bool) -> Tensor:
        """As `StoredTensor.read`, a row of blocks at a time."""
        rows, cols = self.shape
        name = self.module + WEIGHT
        weight, scales = self._read_values(fill=fill), self._read_scales()
        out = torch.empty(rows, cols, dtype=dtype)
        for at, start in enumerate(range(0, rows, self.block[0])):
            part = slice(start, start + self.block[0])
            out[part] = weight[part].float() * scales[at].repeat_interleave(self.block[1])[:cols]
        if not torch.isfinite(out.sum(dim=1)).all() and not torch.isfinite(out).all():
            raise wrong_data(self.files, name, "holds NaN, or a product with its scale is infinite")
        self.files.release(weight)
        return out

    def kept(self, dtype: torch.dtype, *, methods: Collection[Method]) -> RoundedWeight | Tensor:
        """As `StoredMatrix.kept`: mapped from the file where a row has one scale."""
        scales = self._read_scales()
        is_finite = bool(torch.isfinite(scales * FP8_MAX).all())
        if "fp8" not in methods or not self.has_row_scales or not is_finite:
            return self.read(dtype, fill=True)
        values = self._read_values(fill=True)
        if int(values.view(torch.uint8).bitwise_and(NAN_BITS).max()) == NAN_BITS:
            raise wrong_data(self.files, self.module + WEIGHT, "holds NaN")
        rows = self.shape[0]
        return RoundedWeight(
            values=values,
            scales=scales[:, 0].repeat_interleave(self.block[0])[:rows],
            quantization=Quantization(method="fp8", activations=self.activations),
        )

    def _read_values(self, *, fill: bool) -> Tensor:
        # Of shape [O, I] and mapped.
        name = self.module + WEIGHT
        return self.files.read(self.files.entry(name, shape=self.shape, dtypes=("F8_E4M3",)), fill=fill)

    def _read_scales(self) -> Tensor:
        # [blocks of O, blocks of I] float32
        scales = read_scales(self.files, self.scale_name, shape=self.scale_shape)
        return scales.view(-1, -(-self.shape[1] // self.block[1]))


def open_fp8(
    files: Checkpoint,
    module: str,
    *,
    shape: tuple[int, int],
    scale: str,
    block: tuple[int, int] | None,
    is_per_output: bool = False,
    activations: Activations,
) -> Fp8Matrix:
    """Check the tensors of a module.

    Args:
        files: the safetensors files.
        module: its name.
        shape: [out, in].
        scale: suffix of the scales.
        block: outputs and inputs that share a scale; None for one scale, or one an output.
        is_per_output: there is a scale for each output.
        activations: what the format does with inputs.

    Raises:
        CheckpointError: names the tensor that is missing or does not fit.
    """
    rows, cols = shape
    files.entry(module + WEIGHT, shape=shape, dtypes=("F8_E4M3",))
    scale_shape: tuple[int, ...]
    if block is None:
        block = (1 if is_per_output else rows, cols)
        known = ((rows, 1), (rows,)) if is_per_output else ((1,), (), (1, 1))
        scale_shape = shape_of(files, module + scale, known=known)
    else:
        scale_shape = (-(-rows // block[0]), -(-cols // block[1]))
    files.entry(module + scale, shape=scale_shape, dtypes=FLOATS)
    return Fp8Matrix(
        files=files,
        module=module,
        shape=shape,
        scale_name=module + scale,
        scale_shape=scale_shape,
        block=block,
        num_bytes=stored_bytes(files, module, (WEIGHT, scale, *STATIC_INPUTS)),
        activations=activations,
    )


def shape_of(files: Checkpoint, name: str, *, known: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """The spelling of a shape that a file has, or the first of those that are known."""
    entry = files.look_up(name)
    return entry.shape if entry is not None and entry.shape in known else known[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """A `scheme.Scheme` for `quant_method` `fp8`."""

    block: tuple[int, int] | None

    markers: ClassVar[tuple[str, ...]] = (".weight_scale_inv", ".weight_scale")
    suffixes: ClassVar[tuple[str, ...]] = (WEIGHT, *markers, *STATIC_INPUTS)

    @property
    def label(self) -> str:
        """As `Scheme.label`."""
        return "fp8 e4m3" + ("" if self.block is None else f", blocks of {self.block[0]} x {self.block[1]}")

    def open(self, files: Checkpoint, module: str, *, shape: tuple[int, int]) -> Fp8Matrix:
        """As `Scheme.open`."""
        found = [marker for marker in self.markers if files.look_up(module + marker) is not None]
        if len(found) != 1:
            raise CheckpointError(f"{module[:200]}: has {' and '.join(found)}, expected one of them")
        return open_fp8(files, module, shape=shape, scale=found[0], block=self.block, activations="int8")


def read_block(reader: ConfigReader, name: str) -> tuple[int, int] | None:
    """Two sizes of a block, or None if absent.

    Raises:
        CheckpointError: they are no two whole numbers from 1.
    """
    sizes = reader.integers(name)
    if not sizes:
        return None
    if len(sizes) != 2 or 0 in sizes:
        raise reader.wrong(name, "two whole numbers from 1")
    return sizes[0], sizes[1]


def read_fp8(reader: ConfigReader) -> Fp8:
    """Read `quantization_config`.

    Raises:
        UnsupportedModelError: another kind of float.
        CheckpointError: a field is out of range.
    """
    reader.supported("fmt", ("e4m3",), "e4m3")
    reader.supported("activation_scheme", ("dynamic", "static"), "dynamic")
    return Fp8(block=read_block(reader, "weight_block_size"))
