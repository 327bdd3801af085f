"""8-bit floats (e4m3) with a scale for the whole weight, for each output or for each block; dequantized.

```
weight            [O, I] F8_E4M3
weight_scale      [1], [O, 1] or [O / a, I / b]         called weight_scale_inv in block-wise releases
w[o, i] = weight[o, i] * scale of its block
```

No kernel here multiplies 8-bit floats: the weights become the model's dtype, and inputs are not rounded. This
is the scheme of checkpoints with `quant_method` `fp8`; `compressed_tensors` shares the matrix.

**Source:** Micikevicius et al., FP8 Formats for Deep Learning, 2022; DeepSeek-V3 Technical Report, 2024,
section 3.3.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from penstock.core.errors import CheckpointError
from penstock.models.checkpoint import Checkpoint
from penstock.models.config import ConfigReader
from penstock.models.quantized.packing import FLOATS, read_scales, stored_bytes, wrong_data
from penstock.models.quantized.scheme import WEIGHT

STATIC_INPUTS: Final = (".input_scale", ".activation_scale")
"""Of inputs that others round; here they are not."""


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

    def read(self, dtype: torch.dtype, *, fill: bool) -> Tensor:
        """As `StoredTensor.read`, a row of blocks at a time."""
        rows, cols = self.shape
        name = self.module + WEIGHT
        weight = self.files.read(self.files.entry(name, shape=self.shape, dtypes=("F8_E4M3",)), fill=fill)
        scales = read_scales(self.files, self.scale_name, shape=self.scale_shape).view(
            -1, -(-cols // self.block[1])
        )
        out = torch.empty(rows, cols, dtype=dtype)
        for at, start in enumerate(range(0, rows, self.block[0])):
            part = slice(start, start + self.block[0])
            out[part] = weight[part].float() * scales[at].repeat_interleave(self.block[1])[:cols]
        if not torch.isfinite(out.sum(dim=1)).all() and not torch.isfinite(out).all():
            raise wrong_data(self.files, name, "holds NaN, or a product with its scale is infinite")
        self.files.release(weight)
        return out

    def kept(self, dtype: torch.dtype) -> Tensor:
        """As `StoredMatrix.kept`: always dequantized."""
        return self.read(dtype, fill=True)


def open_fp8(
    files: Checkpoint,
    module: str,
    *,
    shape: tuple[int, int],
    scale: str,
    block: tuple[int, int] | None,
    is_per_output: bool = False,
) -> Fp8Matrix:
    """Check the tensors of a module.

    Args:
        files: the safetensors files.
        module: its name.
        shape: [out, in].
        scale: suffix of the scales.
        block: outputs and inputs that share a scale; None for one scale, or one an output.
        is_per_output: there is a scale for each output.

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
        return open_fp8(files, module, shape=shape, scale=found[0], block=self.block)


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
