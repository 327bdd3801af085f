"""A model's tensors on a device, put aside in host memory while the engine sleeps.

Tensors keep their identity: the memory behind them is given up and taken again, so views, layers and whoever
else refers to them need not know. What was recorded with their addresses must be recorded again. The runner
calls it; it has not run on a device yet.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


def tensors_in(root: object) -> Iterator[torch.Tensor]:
    """Every tensor that can be reached from `root` by attributes, lists, tuples and mappings, once each."""
    seen: set[int] = set()
    stack: list[object] = [root]
    while stack:
        found = stack.pop()
        if id(found) in seen or isinstance(found, str | bytes | int | float | type):
            continue
        seen.add(id(found))
        if isinstance(found, torch.Tensor):
            yield found
        elif isinstance(found, Mapping):
            stack.extend(found.values())
        elif isinstance(found, list | tuple | set | frozenset):
            stack.extend(found)
        elif type(found).__module__.partition(".")[0] not in FOREIGN:
            stack.extend(_attributes(found))


FOREIGN = frozenset({"torch", "numpy", "builtins", "functools", "threading", "triton"})
"""Packages into whose objects nobody looks: they hold no weights."""


def _attributes(found: object) -> Iterator[Any]:  # Any: whatever an object holds
    yield from vars(found).values() if hasattr(found, "__dict__") else ()
    for kind in type(found).__mro__:
        for name in getattr(kind, "__slots__", ()):
            if hasattr(found, name):
                yield getattr(found, name)


class StoredWeights:
    """What is put aside, by its storage."""

    def __init__(
        self, model: object, *, lies_on_device: Callable[[torch.Tensor], bool] = lambda tensor: tensor.is_cuda
    ) -> None:
        """Put nothing aside yet.

        Args:
            model: whose tensors.
            lies_on_device: which of them.
        """
        self._model = model
        self._lies_on_device = lies_on_device
        self._storages: list[torch.UntypedStorage] = []
        self._kept: list[torch.Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Host memory that is used now."""
        return sum(kept.nbytes for kept in self._kept)

    def put_aside(self) -> None:
        """Copy what lies on a device to host memory and give the device's memory up."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
            for tensor in tensors_in(self._model)
            if self._lies_on_device(tensor)
        }
        self._storages = list(storages.values())
        for storage in self._storages:
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            self._kept.append(flat.to("cpu", copy=True))
            storage.resize_(0)

    def bring_back(self) -> None:
        """Undo `put_aside`."""
        for storage, kept in zip(self._storages, self._kept, strict=True):
            storage.resize_(kept.nbytes)
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).copy_(kept)
        self._kept.clear()
