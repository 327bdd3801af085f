"""Which part of a stored tensor a rank keeps."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Ranges along one dimension, put together in their order."""

    dim: int
    ranges: tuple[tuple[int, int], ...]
    """(start, stop) of each, at least one."""

    def of(self, tensor: Tensor) -> Tensor:
        """The part: a view of `tensor` where it lies in one piece, else a copy."""
        parts = [tensor.narrow(self.dim, start, stop - start) for start, stop in self.ranges]
        part = parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)
        return part.contiguous()
