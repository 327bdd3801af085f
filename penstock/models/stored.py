"""What a model's tensors are taken from, whatever file format they lie in.

`checkpoint` (safetensors), `quantized` (quantized safetensors) and `gguf` each implement `TensorSource`;
`parts` takes tensors from it by the names and shapes of the architecture files. A source checks its headers
when it is opened and each tensor when it is found; data is read last.
"""

from collections.abc import Collection, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from penstock.kernels.quantization import Method
from penstock.kernels.rounded import RoundedWeight
from penstock.parallel.cut import Cut


class StoredTensor(Protocol):
    """One tensor of a model, found and checked, not read."""

    @property
    def num_bytes(self) -> int:
        """Its size in the files."""
        ...

    def read(self, dtype: torch.dtype, *, fill: bool) -> Tensor:
        """The values in `dtype`: mapped where the file has them so, else converted or dequantized.

        Args:
            dtype: float32 or bfloat16.
            fill: read mapped pages now, not at the first use.

        Raises:
            CheckpointError: the data breaks its format.
        """
        ...


@runtime_checkable
class StoredParts(StoredTensor, Protocol):
    """A tensor of which a part can be read alone."""

    def read_part(self, dtype: torch.dtype, *, cut: Cut) -> Tensor:
        """As `read`, of what the cut leaves; no other pages of the file are read."""
        ...


@runtime_checkable
class StoredMatrix(StoredTensor, Protocol):
    """A quantized matrix [out, in]."""

    def kept(self, dtype: torch.dtype, *, methods: Collection[Method]) -> RoundedWeight | Tensor:
        """The same numbers and scales where the kernels have that grid, else the values in `dtype`.

        Args:
            dtype: float32 or bfloat16.
            methods: of the grids that the kernels have, `KernelSet.rounded_methods`.

        Raises:
            CheckpointError: the data breaks its format.
        """
        ...


class TensorSource(Protocol):
    """The tensors of a checkpoint under the names that the architecture files use."""

    @property
    def label(self) -> str:
        """How the weights are stored, in some words; empty for plain tensors."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def find(self, name: str, *, shape: tuple[int, ...]) -> StoredTensor:
        """Look a tensor up and check it against what the architecture needs.

        Raises:
            CheckpointError: missing, of another shape, or damaged; names file and tensor.
        """
        ...

    def is_quantized(self, name: str) -> bool:
        """True if the tensor is kept as a quantized matrix [out, in], whatever the order of a plain one."""
        ...

    def dtypes(self) -> set[str]:
        """The format's words for all dtypes in the files."""
        ...

    def release(self, tensor: Tensor) -> None:
        """Forget the pages of a mapped tensor that will not be read again."""
        ...

    def is_mapped(self, tensor: Tensor) -> bool:
        """True if the tensor's data is that of a file."""
        ...
