"""compressed-tensors: schemes by groups of modules; integers packed or not, and 8-bit floats.

```
pack-quantized    weight_packed [O, ceil(I b / 32)] int32, values + 2^(b - 1)      weight_shape [2]
                  weight_scale [O, G]      weight_zero_point [ceil(O b / 32), G], where not symmetric
int-quantized     weight [O, I] int8       weight_scale [1], [O, 1] or [O, G]      weight_zero_point the same
float-quantized   weight [O, I] e4m3       weight_scale [1], [O, 1] or blocks
```

Symmetric integers in groups of inputs, or with a scale an output (int8), are grids of the kernels, and so are
floats with a scale an output in some homes. Where the scheme rounds inputs to int8 with a scale a token, so
do the kernels; inputs of floats they round with a scale a token however the scheme does; no others.

**Source:** compressed-tensors 0.20, `compressors/pack_quantized`, `quantization/quant_args.py`.
"""

import re
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from penstock.core.errors import CheckpointError, UnsupportedModelError
from penstock.kernels.quantization import Activations
from penstock.models.checkpoint import Checkpoint
from penstock.models.config import ConfigReader
from penstock.models.quantized.fp8 import open_fp8, read_block, shape_of
from penstock.models.quantized.grid import Grid, GridMatrix
from penstock.models.quantized.packing import (
    FLOATS,
    WORD_BITS,
    check_divides,
    read_scales,
    read_words,
    stored_bytes,
    wrong_data,
)
from penstock.models.stored import StoredMatrix

FORMATS: Final = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
STRATEGIES: Final = ("tensor", "channel", "group", "block")
MAX_GROUPS: Final = 64
"""Groups of modules; real checkpoints have a few."""
MAX_PATTERN_CHARS: Final = 200
MAX_MODULE_CHARS: Final = 200
"""Longer names match no pattern: what a pattern may cost stays small."""
MAX_REPEATS: Final = 4
"""Of a pattern; real ones have one or two, and matching takes their power of the name's length."""
REPEAT: Final = re.compile(r"[*+{]")
REPEATED_GROUP: Final = re.compile(r"\)[*+?{]")
EVERY_LINEAR: Final = "Linear"
"""The target that stands for all linear layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How the weights of some modules are kept."""

    bits: int
    is_float: bool
    is_symmetric: bool
    strategy: str
    group_size: int | None
    """Of the strategy `group`."""
    block: tuple[int, int] | None
    """Of the strategy `block`."""
    activations: Activations

    def __str__(self) -> str:
        kind = "fp8" if self.is_float else f"int{self.bits}"
        if self.strategy == "group":
            return f"{kind}, groups of {self.group_size}"
        if self.block is not None:
            return f"{kind}, blocks of {self.block[0]} x {self.block[1]}"
        return f"{kind}, a scale a {self.strategy}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Modules that are kept in one way."""

    targets: tuple[str, ...]
    """Names, `re:` and a pattern, or `Linear`."""
    weights: Weights

    def rank(self, module: str) -> int:
        """How precisely a target means the module: 3 its name, 2 a pattern, 1 every linear layer, 0 not."""
        ranks = [0]
        for target in self.targets:
            is_pattern = target.startswith("re:")
            if is_pattern and re.match(target.removeprefix("re:"), module[:MAX_MODULE_CHARS]):
                ranks.append(2)
            elif target == module:
                ranks.append(3)
            elif target == EVERY_LINEAR:
                ranks.append(1)
        return max(ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedTensors:
    """A `scheme.Scheme`."""

    groups: tuple[Group, ...]

    markers: ClassVar[tuple[str, ...]] = (".weight_scale",)
    suffixes: ClassVar[tuple[str, ...]] = (
        ".weight", ".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx",
        ".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point",
    )  # fmt: skip

    @property
    def label(self) -> str:
        """As `Scheme.label`."""
        return "compressed-tensors " + "; ".join(dict.fromkeys(str(group.weights) for group in self.groups))

    def open(self, files: Checkpoint, module: str, *, shape: tuple[int, int]) -> StoredMatrix:
        """As `Scheme.open`."""
        best = max(self.groups, key=lambda group: group.rank(module))
        if best.rank(module) == 0:
            raise CheckpointError(
                f"{module[:200]}.weight_scale: no group of config_groups targets this module"
            )
        weights = best.weights
        if weights.is_float:
            is_per_output = weights.strategy == "channel"
            return open_fp8(
                files,
                module,
                shape=shape,
                scale=".weight_scale",
                block=weights.block,
                is_per_output=is_per_output,
                activations=weights.activations,
            )
        stored = _Integers.find(files, module, shape=shape, weights=weights)
        return GridMatrix(
            load=stored.read,
            num_bytes=stored_bytes(files, module, self.suffixes),
            activations=weights.activations,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Integers:
    """The integer tensors of a module, checked."""

    files: Checkpoint
    module: str
    shape: tuple[int, int]
    weights: Weights
    group_size: int
    is_packed: bool
    scale_shape: tuple[int, ...]

    @property
    def num_groups(self) -> int:
        """Groups of inputs."""
        return -(-self.shape[1] // self.group_size)

    @classmethod
    def find(cls, files: Checkpoint, module: str, *, shape: tuple[int, int], weights: Weights) -> "_Integers":
        rows, cols = shape
        size = weights.group_size or cols
        check_divides(size, cols, module=module, what="group_size")
        known: tuple[tuple[int, ...], ...] = ((rows, cols // size), (rows,))[: 1 + (size == cols)]
        if weights.strategy == "tensor":
            known = ((1,), (), (1, 1))
        scale_shape = shape_of(files, f"{module}.weight_scale", known=known)
        files.entry(f"{module}.weight_scale", shape=scale_shape, dtypes=FLOATS)
        integers = cls(
            files=files,
            module=module,
            shape=shape,
            weights=weights,
            group_size=size,
            is_packed=files.look_up(f"{module}.weight_packed") is not None,
            scale_shape=scale_shape,
        )
        integers._check()
        return integers

    def _check(self) -> None:
        rows, cols = self.shape
        if self.is_packed:
            check_divides(
                WORD_BITS // self.weights.bits, cols, module=self.module, what="the values in a word"
            )
            words = cols * self.weights.bits // WORD_BITS
            self.files.entry(f"{self.module}.weight_packed", shape=(rows, words), dtypes=("I32",))
            self.files.entry(f"{self.module}.weight_shape", shape=(2,), dtypes=("I64", "I32"))
        else:
            self.files.entry(f"{self.module}.weight", shape=self.shape, dtypes=("I8",))
        if self.files.look_up(f"{self.module}.weight_g_idx") is not None:
            self.files.entry(f"{self.module}.weight_g_idx", shape=(cols,), dtypes=("I32",))
        if not self.weights.is_symmetric:
            shape, dtype = self._zero_shape()
            self.files.entry(f"{self.module}.weight_zero_point", shape=shape, dtypes=(dtype,))

    def _zero_shape(self) -> tuple[tuple[int, ...], str]:
        if self.is_packed and self.weights.strategy != "tensor":
            per_word = WORD_BITS // self.weights.bits
            return (-(-self.shape[0] // per_word), self.num_groups), "I32"
        return self.scale_shape, "I8"

    def read(self) -> Grid:
        """Values and scales, zero points subtracted."""
        values = self._read_values()
        rows, cols = self.shape
        group_of = self._read_group_of()
        if not self.weights.is_symmetric:
            zeros = self._read_zeros().to(torch.int16).expand(rows, self.num_groups)
            index = torch.arange(cols) // self.group_size if group_of is None else group_of
            values = values.to(torch.int16) - zeros[:, index]
        scales = read_scales(self.files, f"{self.module}.weight_scale", shape=self.scale_shape)
        scales = scales.reshape(-1, self.num_groups).expand(rows, self.num_groups).contiguous()
        return Grid(values=values, scales=scales, group_size=self.group_size, group_of=group_of)

    def _read_values(self) -> Tensor:
        rows, cols = self.shape
        if not self.is_packed:
            name = f"{self.module}.weight"
            return self.files.read(self.files.entry(name, shape=self.shape, dtypes=("I8",))).clone()
        name, bits = f"{self.module}.weight_packed", self.weights.bits
        said = self.files.read(
            self.files.entry(f"{self.module}.weight_shape", shape=(2,), dtypes=("I64", "I32"))
        )
        if said.tolist() != [rows, cols]:
            raise wrong_data(
                self.files, f"{self.module}.weight_shape", f"says {said.tolist()}, expected {[rows, cols]}"
            )
        unsigned = read_words(self.files, name, shape=(rows, cols * bits // WORD_BITS), bits=bits, dim=1)
        return (unsigned.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)

    def _read_zeros(self) -> Tensor:
        name = f"{self.module}.weight_zero_point"
        shape, dtype = self._zero_shape()
        if dtype == "I8":
            return self.files.read(self.files.entry(name, shape=shape, dtypes=("I8",))).reshape(
                -1, self.num_groups
            )
        bits = self.weights.bits
        unsigned = read_words(self.files, name, shape=(shape[0], self.num_groups), bits=bits, dim=0)
        return unsigned[: self.shape[0]].to(torch.int16) - (1 << (bits - 1))

    def _read_group_of(self) -> Tensor | None:
        name, cols = f"{self.module}.weight_g_idx", self.shape[1]
        if self.files.look_up(name) is None:
            return None
        groups = self.files.read(self.files.entry(name, shape=(cols,), dtypes=("I32",))).long()
        if int(groups.min()) < 0 or int(groups.max()) >= self.num_groups:
            raise wrong_data(self.files, name, f"holds a group that is none of 0 to {self.num_groups - 1}")
        return None if torch.equal(groups, torch.arange(cols) // self.group_size) else groups


def _read_activations(reader: ConfigReader, *, is_float: bool) -> Activations:
    # The kernels' own rule, or none; floats are rounded by it whatever scales the format has for them.
    if not reader.has("input_activations"):
        return "bf16"
    inputs = reader.section("input_activations")
    rule = {
        "num_bits": inputs.integer("num_bits", 8, high=64),
        "type": inputs.text("type", "int"),
        "symmetric": inputs.boolean("symmetric", True),
        "strategy": inputs.text("strategy", "tensor"),
        "dynamic": inputs.supported("dynamic", (True, False), False),
    }
    kernels = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    if is_float:
        kernels = rule | {"num_bits": 8, "type": "float", "symmetric": True}
    return "int8" if rule == kernels else "bf16"


def _read_weights(reader: ConfigReader) -> Weights:
    weights = reader.section("weights")
    is_float = weights.supported("type", ("int", "float"), "int") == "float"
    strategy: str = weights.supported("strategy", STRATEGIES)
    weights.supported("dynamic", (False,), False)
    block = read_block(weights, "block_structure")
    if (strategy == "block") is not (block is not None) or (strategy == "block" and not is_float):
        raise weights.wrong("block_structure", "two sizes with the strategy 'block' of floats, and only then")
    if strategy == "group" and is_float:
        raise UnsupportedModelError(
            f"{weights.source}: floats in groups are not supported; known: tensor, channel, block"
        )
    return Weights(
        bits=weights.supported("num_bits", (8,) if is_float else (4, 8)),
        is_float=is_float,
        is_symmetric=weights.boolean("symmetric", True),
        strategy=strategy,
        group_size=weights.integer("group_size", low=2) if strategy == "group" else None,
        block=block,
        activations=_read_activations(reader, is_float=is_float),
    )


def _check_target(reader: ConfigReader, target: str) -> None:
    # Patterns come with the checkpoint: none may take long.
    if len(target) > MAX_PATTERN_CHARS:
        raise reader.wrong("targets", f"names and patterns of at most {MAX_PATTERN_CHARS} characters")
    if not target.startswith("re:"):
        return
    if len(REPEAT.findall(target)) > MAX_REPEATS or REPEATED_GROUP.search(target):
        raise reader.wrong("targets", f"patterns of at most {MAX_REPEATS} repeats, none of a group")
    try:
        re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise reader.wrong("targets", f"patterns that can be read ({error})") from None


def _read_group(reader: ConfigReader) -> Group:
    targets = reader.texts("targets")
    for target in targets:
        _check_target(reader, target)
    reader.supported("format", FORMATS, FORMATS[0])
    reader.refuse("output_activations", unless={})
    return Group(targets=targets, weights=_read_weights(reader))


def read_compressed_tensors(reader: ConfigReader) -> CompressedTensors:
    """Read `quantization_config`.

    Raises:
        UnsupportedModelError: a format, a kind of number or a transformation that is not built here.
        CheckpointError: a field is out of range.
    """
    reader.supported("format", FORMATS, FORMATS[0])
    reader.refuse("kv_cache_scheme", unless={})
    reader.refuse("transform_config", unless={})
    if reader.has("sparsity_config"):
        reader.section("sparsity_config").supported("format", ("dense",), "dense")
    sections = reader.sections("config_groups", most=MAX_GROUPS)
    return CompressedTensors(groups=tuple(_read_group(section) for section in sections))
