"""One of the ranks that compute a model together, and what it does with the others.

Weights are cut as in Megatron-LM: the outputs of the first product of a pair (columns of its transposed
weight), the inputs of the second (rows), so that each pair ends in one sum over the ranks. Heads follow their
columns, so each rank keeps the keys and values of its own heads. Vocabulary: each rank keeps some rows.

**Source:** Shoeybi et al., Megatron-LM, 2019, section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from torch import Tensor

from penstock.core.errors import StartupError
from penstock.parallel.cut import Cut


class Collectives(Protocol):
    """What all ranks do together; each call is made by every rank, in the same order."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, of x's shape and dtype; the same bits on every rank."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape]: x of every rank, by index."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """See the module."""

    index: int = 0
    size: int = 1
    collectives: Collectives | None = None
    """None for a rank that is alone."""

    @property
    def is_alone(self) -> bool:
        """True if there is nothing to be shared."""
        return self.size == 1

    def share(self, total: int, *, of: str) -> tuple[int, int]:
        """This rank's equal part [start, stop) of `total` things.

        Raises:
            StartupError: they cannot be shared equally; names `of`.
        """
        if total % self.size:
            raise StartupError(
                f"tensor_parallel_size is {self.size}, it must divide {of}, which is {total}",
                param="tensor_parallel_size",
            )
        part = total // self.size
        return self.index * part, (self.index + 1) * part

    def num(self, total: int, *, of: str) -> int:
        """How many of `total` things are this rank's; raises as `share`."""
        start, stop = self.share(total, of=of)
        return stop - start

    def cut(self, sizes: Sequence[int], *, dim: int, of: str) -> Cut | None:
        """This rank's part of a dimension that holds pieces of `sizes`: an equal part of each.

        Returns:
            None if the rank is alone and takes all.

        Raises:
            StartupError: as `share`.
        """
        if self.is_alone:
            return None
        ranges, offset = [], 0
        for size in sizes:
            start, stop = self.share(size, of=of)
            ranges.append((offset + start, offset + stop))
            offset += size
        return Cut(dim=dim, ranges=tuple(ranges))

    def rows(self, total: int) -> tuple[int, int]:
        """This rank's rows [start, stop) of a vocabulary; the last rank may have fewer.

        Raises:
            StartupError: there are too few for all ranks to have some.
        """
        part = -(-total // self.size)
        if (self.size - 1) * part >= total:
            raise StartupError(
                f"tensor_parallel_size is {self.size}, too many for a vocabulary of {total}",
                param="tensor_parallel_size",
            )
        return self.index * part, min((self.index + 1) * part, total)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks."""
        return x if self.collectives is None else self.collectives.all_reduce(x)

    def join(self, x: Tensor, *, total: int) -> Tensor:
        """Columns of all ranks beside each other.

        Args:
            x: [rows, n] this rank's columns, n as `rows(total)` says.
            total: columns of all ranks.

        Returns:
            [rows, total].
        """
        if self.collectives is None:
            return x
        part = -(-total // self.size)
        padded = x.new_zeros(x.shape[0], part)
        padded[:, : x.shape[1]] = x
        gathered = self.collectives.all_gather(padded)
        return gathered.transpose(0, 1).reshape(x.shape[0], -1)[:, :total].contiguous()


ALONE: Final = Rank()
