"""AWQ: 4-bit integers with zero points for groups of inputs, packed along the outputs.

```
qweight [I, O / 8] int32     value j of a word stands for output ORDER[j] of its eight
qzeros  [G, O / 8] int32     the same for the zero points
scales  [G, O]               float16 or bfloat16
w[o, i] = (q[i, o] - z[g, o]) * s[g, o]        g = i // group_size
```

Where all q - z lie in [-8, 7] (zero points of 8, for one) that is a grid of the kernels; else a weight is
dequantized.

**Source:** Lin et al., AWQ: Activation-aware Weight Quantization, 2023; the `gemm` layout of AutoAWQ
(`awq/modules/linear/gemm.py`).
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final

import torch
from torch import Tensor

from penstock.models.checkpoint import Checkpoint
from penstock.models.config import ConfigReader
from penstock.models.quantized.grid import Grid, GridMatrix
from penstock.models.quantized.packing import (
    check_divides,
    read_group_size,
    read_scales,
    read_words,
    stored_bytes,
)

ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output of each of a word's values, counted from the lowest bits."""
BITS: Final = 4
WORD_VALUES: Final = 8


def outputs_in_order(values: Tensor) -> Tensor:
    """[rows, O] as unpacked to [rows, O] with the outputs in their order."""
    words = values.view(values.shape[0], -1, WORD_VALUES)
    return words[:, :, torch.tensor(ORDER).argsort()].flatten(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """A `scheme.Scheme`."""

    group_size: int | None
    """Inputs that share a scale; None for all of a weight."""

    markers: ClassVar[tuple[str, ...]] = (".qweight",)
    suffixes: ClassVar[tuple[str, ...]] = (".qweight", ".qzeros", ".scales")

    @property
    def label(self) -> str:
        """As `Scheme.label`."""
        return f"awq int4, groups of {self.group_size or 'all inputs'}"

    def open(self, files: Checkpoint, module: str, *, shape: tuple[int, int]) -> GridMatrix:
        """As `Scheme.open`."""
        rows, cols = shape
        size = self.group_size or cols
        check_divides(size, cols, module=module, what="group_size")
        check_divides(WORD_VALUES, rows, module=module, what="the number of outputs packed together")
        groups = cols // size
        files.entry(f"{module}.qweight", shape=(cols, rows // WORD_VALUES), dtypes=("I32",))
        files.entry(f"{module}.qzeros", shape=(groups, rows // WORD_VALUES), dtypes=("I32",))
        files.entry(f"{module}.scales", shape=(groups, rows))
        return GridMatrix(
            load=partial(_read_grid, files, module, shape=shape, group_size=size),
            num_bytes=stored_bytes(files, module, self.suffixes),
        )


def _read_grid(files: Checkpoint, module: str, *, shape: tuple[int, int], group_size: int) -> Grid:
    rows, cols = shape
    groups, words = cols // group_size, rows // WORD_VALUES
    packed = read_words(files, f"{module}.qweight", shape=(cols, words), bits=BITS, dim=1)
    zeros = read_words(files, f"{module}.qzeros", shape=(groups, words), bits=BITS, dim=1)
    values = outputs_in_order(packed).view(groups, group_size, rows).to(torch.int8)
    values -= outputs_in_order(zeros)[:, None].to(torch.int8)
    scales = read_scales(files, f"{module}.scales", shape=(groups, rows))
    return Grid(
        values=values.view(cols, rows).t().contiguous(),
        scales=scales.t().contiguous(),
        group_size=group_size,
    )


def read_awq(reader: ConfigReader) -> Awq:
    """Read `quantization_config`.

    Raises:
        UnsupportedModelError: other bits or another layout than 4 and `gemm`.
        CheckpointError: a field is out of range.
    """
    reader.supported("bits", (BITS,), reader.supported("w_bit", (BITS,), BITS))
    reader.supported("version", ("gemm", "GEMM"), "gemm")
    older = reader.integer("q_group_size", 128, low=-1)
    return Awq(group_size=read_group_size(reader, default=older))
