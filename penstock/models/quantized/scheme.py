"""A quantized checkpoint as a source of tensors: which modules are quantized, and by which format.

```
files      model.layers.0.mlp.up_proj.qweight  .qzeros  .scales        model.norm.weight
source     model.layers.0.mlp.up_proj.weight (quantized)               model.norm.weight (plain)
```

A format implements `Scheme`; `QuantizedCheckpoint` is a `stored.TensorSource` over its files.
"""

from collections.abc import Iterator
from typing import Final, Protocol

from torch import Tensor

from penstock.core.errors import CheckpointError
from penstock.models.checkpoint import Checkpoint
from penstock.models.stored import StoredMatrix, StoredTensor


class Scheme(Protocol):
    """One quantized format, with what `quantization_config` says."""

    @property
    def label(self) -> str:
        """The format in some words, for the start table."""
        ...

    @property
    def markers(self) -> tuple[str, ...]:
        """Suffixes that tell a quantized module: `module + marker` is one of its tensors."""
        ...

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of all tensors that a quantized module may have, the marker included."""
        ...

    def open(self, files: Checkpoint, module: str, *, shape: tuple[int, int]) -> StoredMatrix:
        """Check the tensors of a quantized module.

        Args:
            files: the safetensors files.
            module: its name, without `.weight`.
            shape: [out, in] of its weight.

        Raises:
            CheckpointError: a tensor is missing, or its shape or dtype does not fit; names file and tensor.
        """
        ...


WEIGHT: Final = ".weight"


class QuantizedCheckpoint:
    """Plain tensors of the files, and quantized modules as one `weight` each; a `stored.TensorSource`."""

    def __init__(self, files: Checkpoint, scheme: Scheme) -> None:
        self._files = files
        self._scheme = scheme
        self._modules = {
            name.removesuffix(marker) for name in files for marker in scheme.markers if name.endswith(marker)
        }
        inner = {module + suffix for module in self._modules for suffix in scheme.suffixes}
        self._plain = dict.fromkeys(name for name in files if name not in inner)
        self.label = scheme.label

    def __contains__(self, name: str) -> bool:
        return self.is_quantized(name) or name in self._plain

    def __iter__(self) -> Iterator[str]:
        yield from (module + WEIGHT for module in sorted(self._modules))
        yield from self._plain

    def find(self, name: str, *, shape: tuple[int, ...]) -> StoredTensor:
        """As `TensorSource.find`."""
        if not self.is_quantized(name):
            return self._files.find(name, shape=shape)
        if len(shape) != 2:
            raise CheckpointError(f"tensor {name!r} of shape {list(shape)} is quantized, but it is no matrix")
        return self._scheme.open(self._files, name.removesuffix(WEIGHT), shape=(shape[0], shape[1]))

    def is_quantized(self, name: str) -> bool:
        """As `TensorSource.is_quantized`."""
        return name.endswith(WEIGHT) and name.removesuffix(WEIGHT) in self._modules

    def dtypes(self) -> set[str]:
        """As `TensorSource.dtypes`."""
        return self._files.dtypes()

    def release(self, tensor: Tensor) -> None:
        """As `TensorSource.release`."""
        self._files.release(tensor)

    def is_mapped(self, tensor: Tensor) -> bool:
        """As `TensorSource.is_mapped`."""
        return self._files.is_mapped(tensor)
