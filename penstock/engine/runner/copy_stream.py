"""A queue of copies that a device makes beside its steps. `host_blocks` fills it.

The protocol is small so that its user is tested without a device.
"""

import weakref
from collections.abc import Callable
from typing import Protocol

import torch


class Ticket(Protocol):
    """One piece of work in the queue."""

    @property
    def is_done(self) -> bool:
        """True once it has ended; never blocks."""
        ...

    @property
    def time_s(self) -> float:
        """What it took, by the device's clock; valid once it is done."""
        ...

    def wait(self) -> None:
        """Return when it is done."""
        ...


class CopyStream(Protocol):
    """Work in the order in which it was put in."""

    def put(self, work: Callable[[], None]) -> Ticket:
        """Queue what `work` starts, behind all that the steps launched so far do; returns at once."""
        ...


class _CudaTicket:
    def __init__(self, began: torch.cuda.Event, ended: torch.cuda.Event) -> None:
        self._began, self._ended = began, ended

    @property
    def is_done(self) -> bool:
        """See `Ticket`."""
        return bool(self._ended.query())  # type: ignore[no-untyped-call]  # torch.cuda has no annotations

    @property
    def time_s(self) -> float:
        """See `Ticket`."""
        return float(self._began.elapsed_time(self._ended)) / 1000

    def wait(self) -> None:
        """See `Ticket`."""
        self._ended.synchronize()


def pin(memory: torch.Tensor, *, owner: object) -> None:
    """Keep host memory where it is until `owner` goes, so that a device copies it without the host's help.

    Done with the driver's own call: torch's allocator of pinned memory rounds every size up to a power of
    two, which is twice as much as is asked for at worst.

    Raises:
        CudaError: so much memory cannot be pinned.
    """
    driver = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch.cuda has no annotations
    torch.cuda.check_error(driver.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    weakref.finalize(owner, driver.cudaHostUnregister, memory.data_ptr())


class CudaCopyStream:
    """A `CopyStream` on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch.cuda has none

    def put(self, work: Callable[[], None]) -> Ticket:
        """See `CopyStream`."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]  # as above
        began, ended = events
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            began.record(self._stream)
            work()
            ended.record(self._stream)
        return _CudaTicket(began, ended)
