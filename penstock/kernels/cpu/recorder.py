"""Writes a pass of a model down: its kernel calls, and the plain torch calls between them.

The model runs once over `meta` tensors, which have shapes and no data. A tensor's storage names the buffer,
its offset and strides the columns; views therefore need no operation. The first dimension of every tensor
is the step's tokens: `TRACE_ROWS`, a number that no other dimension has.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.kernels.batch import KvSlab
from penstock.kernels.cpu.tape import Buffer, Convert, Operation, Role, Scale, Slice, Sum, Tape

TRACE_ROWS: Final = 7919
"""A prime, so that no product of a model's sizes equals it."""

aten = torch.ops.aten
VIEWS: Final = frozenset(
    {aten.view, aten.reshape, aten.slice, aten.split, aten.split_with_sizes, aten.alias, aten.detach,
     aten.unsqueeze, aten.squeeze, aten.t, aten.transpose, aten.permute, aten.expand, aten.select,
     aten.as_strided, aten.unsafe_chunk, aten.chunk}
)  # fmt: skip
"""Calls whose result is a view; what of it does not name columns is refused where it is used."""
COPIES: Final = frozenset({aten.clone, getattr(aten, "_to_copy")})  # noqa: B009  what `to` becomes


class NotRecordableError(Exception):
    """A model does something between its kernels that no operation stands for."""


class Recorder:
    """The buffers and operations of one recording."""

    def __init__(self, *, slabs: Sequence[KvSlab] = ()) -> None:
        """Begin with nothing.

        Args:
            slabs: for each layer one of its own, whose identity names the layer.
        """
        self._layers = {id(slab): layer for layer, slab in enumerate(slabs)}
        self._buffers: list[Buffer] = []
        self._operations: list[Operation] = []
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []
        self._inputs: list[int] = []

    def add_input(self, tensor: Tensor) -> Tensor:
        """Declare a tensor that each run brings; returns it."""
        self._inputs.append(self._add_buffer(tensor, role=Role.EXTERNAL))
        return tensor

    def take(self, tensor: Tensor) -> Slice:
        """The columns that a tensor names.

        Raises:
            NotRecordableError: it is not made of rows of the step, or no operation made it.
        """
        buffer = self._numbers.get(_name(tensor))
        if buffer is None:
            raise NotRecordableError(f"a tensor of shape {list(tensor.shape)} that no recorded call made")
        row = self._buffers[buffer].cols
        cols = math.prod(tensor.shape[1:])
        is_rows = tensor.shape[:1] == (TRACE_ROWS,) and tensor.stride(0) == row
        if not is_rows or not tensor[0].is_contiguous() or int(tensor.storage_offset()) + cols > row:
            raise NotRecordableError(
                f"a view of shape {list(tensor.shape)} and strides {tensor.stride()} that is not columns"
            )
        return Slice(buffer=buffer, col=int(tensor.storage_offset()), cols=cols)

    def make(self, *cols: int, dtype: torch.dtype) -> Slice:
        """A new buffer for [TRACE_ROWS, *cols]."""
        tensor = torch.empty(TRACE_ROWS, *cols, dtype=dtype, device="meta")
        return self.whole(self._add_buffer(tensor, role=Role.OWN))

    def result(self, place: Slice) -> Tensor:
        """The tensor of a place from `make`."""
        return self._alive[place.buffer]

    def layer(self, slab: KvSlab) -> int:
        """The layer whose keys and values these are."""
        return self._layers[id(slab)]

    def run(self) -> None:
        """Nothing: it runs when the tape does."""

    def whole(self, buffer: int) -> Slice:
        """All columns of a buffer."""
        return Slice(buffer=buffer, col=0, cols=self._buffers[buffer].cols)

    def add(self, operation: Operation) -> None:
        """Append an operation."""
        self._operations.append(operation)

    def tape(self, result: Tensor) -> Tape:
        """What was recorded; the result is copied to a buffer that each run brings."""
        place = self.take(result)
        kept = torch.empty(TRACE_ROWS, place.cols, dtype=result.dtype, device="meta")
        output = self._add_buffer(kept, role=Role.EXTERNAL)
        self.add(Convert(x=place, out=self.whole(output)))
        return Tape(
            buffers=tuple(self._buffers),
            operations=tuple(self._operations),
            inputs=tuple(self._inputs),
            outputs=(output,),
        )

    def _add_buffer(self, tensor: Tensor, *, role: Role) -> int:
        number = len(self._buffers)
        self._buffers.append(Buffer(dtype=tensor.dtype, cols=math.prod(tensor.shape[1:]), role=role))
        self._numbers[_name(tensor)] = number
        self._alive.append(tensor)  # a storage's address is its name as long as it lives
        return number


class TorchCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own, untyped
    """Writes down what a model asks of torch itself: sums, products with a number, copies."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is ever compiled, and the guard against it imports torch's compiler: 1.5 s a start.
        return False

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as the class
        self._recorder = recorder

    def __torch_dispatch__(  # torch's own signature
        self,
        func: Any,  # an operator of torch, untyped there
        types: Any,  # as `func`
        args: tuple[Any, ...] = (),  # as `func`
        kwargs: dict[str, Any] | None = None,  # as `func`
    ) -> Any:  # whatever the operator returns
        del types
        name = func.overloadpacket
        if name is aten.add and all(map(_is_step, args)) and (kwargs or {}).get("alpha", 1) == 1:
            return self._sum(*args)
        if name is aten.mul and _is_step(args[0]) and not _is_step(args[1]):
            return self._scale(*args)
        is_known = name in VIEWS or name in COPIES or not any(map(_is_step, args))
        if not is_known:  # not called: over meta tensors a sum, say, imports torch's compiler
            raise NotRecordableError(f"a call of torch's {func}")
        made = func(*args, **(kwargs or {}))
        if name not in COPIES or not _is_step(args[0]):
            return made
        return self._write(made, lambda out: Convert(x=self._recorder.take(args[0]), out=out))

    def _sum(self, first: Tensor, second: Tensor) -> Tensor:
        if first.shape != second.shape or first.dtype != second.dtype:
            raise NotRecordableError(f"a sum of shapes {list(first.shape)} and {list(second.shape)}")
        take = self._recorder.take
        return self._write(first, lambda out: Sum(a=take(first), b=take(second), out=out))

    def _scale(self, x: Tensor, factor: Tensor | float) -> Tensor:
        value = factor.item() if isinstance(factor, Tensor) and factor.numel() == 1 else factor
        if not isinstance(value, int | float) or torch.result_type(x, factor) != x.dtype:
            raise NotRecordableError("a product that is not one of a row and a number")
        return self._write(x, lambda out: Scale(x=self._recorder.take(x), factor=float(value), out=out))

    def _write(self, made: Tensor, operation: Callable[[Slice], Operation]) -> Tensor:
        """Append an operation whose result is like `made`."""
        if made.shape[:1] != (TRACE_ROWS,):
            raise NotRecordableError(f"a copy of shape {list(made.shape)}, which is not rows of the step")
        out = self._recorder.make(*made.shape[1:], dtype=made.dtype)
        self._recorder.add(operation(out))
        return self._recorder.result(out)


def _is_step(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


def _name(tensor: Tensor) -> int:
    """What names a tensor's storage as long as it lives; `meta` tensors have no address."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001  torch has no public name for it
