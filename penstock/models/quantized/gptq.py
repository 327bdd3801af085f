"""GPTQ: 4- or 8-bit integers with zero points for groups of inputs, packed along the inputs.

```
qweight [I * b / 32, O] int32     value j of a word is input 32 / b * row + j
qzeros  [G, O * b / 32] int32     zero points; in the format `gptq` one less than they are, in `gptq_v2` not
scales  [G, O]
g_idx   [I] int32                 the group of each input
w[o, i] = (q[i, o] - z[g, o]) * s[g, o]        g = g_idx[i]
```

Symmetric weights (zero points of half the range) whose groups are runs of inputs are a grid of the kernels.
With act-order the groups are scattered: such a weight is dequantized, each input with its group's scale.

**Source:** Frantar et al., GPTQ, 2022; the layouts of AutoGPTQ and GPTQModel (`nn_modules/qlinear/torch.py`).
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
    WORD_BITS,
    check_divides,
    read_group_size,
    read_scales,
    read_words,
    stored_bytes,
    wrong_data,
)

BITS: Final = (4, 8)
FORMATS: Final = ("gptq", "gptq_v2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """A `scheme.Scheme`."""

    bits: int
    group_size: int | None
    """Inputs that share a scale; None for all of a weight."""
    zero_offset: int
    """What the stored zero points lack: 1 in the first format."""

    markers: ClassVar[tuple[str, ...]] = (".qweight",)
    suffixes: ClassVar[tuple[str, ...]] = (".qweight", ".qzeros", ".scales", ".g_idx")

    @property
    def label(self) -> str:
        """As `Scheme.label`."""
        return f"gptq int{self.bits}, groups of {self.group_size or 'all inputs'}"

    @property
    def per_word(self) -> int:
        """Values of a word."""
        return WORD_BITS // self.bits

    def open(self, files: Checkpoint, module: str, *, shape: tuple[int, int]) -> GridMatrix:
        """As `Scheme.open`."""
        rows, cols = shape
        for size, what in ((rows, "outputs"), (cols, "inputs")):
            check_divides(self.per_word, size, module=module, what=f"the number of {what} packed together")
        groups = -(-cols // (self.group_size or cols))
        files.entry(f"{module}.qweight", shape=(cols // self.per_word, rows), dtypes=("I32",))
        files.entry(f"{module}.qzeros", shape=(groups, rows // self.per_word), dtypes=("I32",))
        files.entry(f"{module}.scales", shape=(groups, rows))
        if files.look_up(f"{module}.g_idx") is not None:
            files.entry(f"{module}.g_idx", shape=(cols,), dtypes=("I32",))
        return GridMatrix(
            load=partial(_read_grid, files, module, shape=shape, gptq=self),
            num_bytes=stored_bytes(files, module, self.suffixes),
        )


def _read_groups(files: Checkpoint, module: str, *, num_inputs: int, group_size: int) -> Tensor:
    # [I] int64, each checked to be a group that there is.
    in_order = torch.arange(num_inputs) // group_size
    name = f"{module}.g_idx"
    if files.look_up(name) is None:
        return in_order
    groups = files.read(files.entry(name, shape=(num_inputs,), dtypes=("I32",))).long()
    low, high = (int(bound) for bound in groups.aminmax())
    if low < 0 or high > int(in_order[-1]):
        raise wrong_data(
            files, name, f"holds groups from {low} to {high}, there are 0 to {int(in_order[-1])}"
        )
    return groups


def _read_grid(files: Checkpoint, module: str, *, shape: tuple[int, int], gptq: Gptq) -> Grid:
    rows, cols = shape
    size, per_word = gptq.group_size or cols, gptq.per_word
    num_groups = -(-cols // size)
    values = read_words(files, f"{module}.qweight", shape=(cols // per_word, rows), bits=gptq.bits, dim=0)
    zeros = read_words(files, f"{module}.qzeros", shape=(num_groups, rows // per_word), bits=gptq.bits, dim=1)
    group_of = _read_groups(files, module, num_inputs=cols, group_size=size)
    shifted = values.to(torch.int16) - (zeros.to(torch.int16) + gptq.zero_offset)[group_of]
    scales = read_scales(files, f"{module}.scales", shape=(num_groups, rows))
    is_in_order = torch.equal(group_of, torch.arange(cols) // size)
    return Grid(
        values=shifted.t().contiguous(),
        scales=scales.t().contiguous(),
        group_size=size,
        group_of=None if is_in_order else group_of,
    )


def read_gptq(reader: ConfigReader) -> Gptq:
    """Read `quantization_config`.

    Raises:
        UnsupportedModelError: other bits, another layout, or rules for single modules.
        CheckpointError: a field is out of range.
    """
    bits: int = reader.supported("bits", BITS)
    layout: str = reader.supported("checkpoint_format", FORMATS, "gptq")
    reader.supported("is_marlin_format", (False,), False)
    reader.supported("pack_dtype", ("int32",), "int32")
    reader.refuse("dynamic", unless={})
    return Gptq(bits=bits, group_size=read_group_size(reader), zero_offset=int(layout == "gptq"))
