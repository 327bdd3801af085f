"""A home on a device behind tensors of the host, so that one contract test serves both."""

import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

DEVICE = os.environ.get("PENSTOCK_TEST_DEVICE", "cpu")
"""`cuda` where `benchmarks.device` runs the tests on a device, without the interpreter."""


def on_test_device(kernels: Any, device: str = DEVICE) -> Any:
    """The home itself on the CPU; else one that moves what it is given to the device and results back."""
    return kernels if device == "cpu" else MovingHome(kernels, device)


class MovingHome:
    """Moves every tensor of a call's arguments to the device, and back what the call wrote to it."""

    def __init__(self, kernels: Any, device: str) -> None:
        self._kernels = kernels
        self._device = device

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._kernels, name)
        return self._moving(found) if callable(found) and name != "kv_block" else found

    def _moving(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def moved(*args: Any, **options: Any) -> Any:
            pairs: list[tuple[Tensor, Tensor]] = []
            result = operation(*self._sent(args, pairs), **self._sent(options, pairs))
            for before, after in pairs:
                before.copy_(after)
            return _back(result)

        return moved

    def _sent(self, value: Any, pairs: list[tuple[Tensor, Tensor]]) -> Any:
        if isinstance(value, Tensor) and value.device.type == "cpu":
            copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=self._device)
            pairs.append((value, copy.copy_(value)))
            return copy
        if isinstance(value, tuple | list):
            return type(value)(self._sent(each, pairs) for each in value)
        if isinstance(value, dict):
            return {key: self._sent(each, pairs) for key, each in value.items()}
        if is_dataclass(value) and not isinstance(value, type) and _holds_host_tensors(value):
            own = [field.name for field in fields(value) if field.init]
            return replace(value, **{name: self._sent(getattr(value, name), pairs) for name in own})
        return value


def _holds_host_tensors(value: Any) -> bool:
    return any(
        isinstance(each, Tensor) and each.device.type == "cpu"
        for each in (getattr(value, field.name) for field in fields(value))
    )


def _back(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.cpu()
    return tuple(map(_back, result)) if isinstance(result, tuple) else result
