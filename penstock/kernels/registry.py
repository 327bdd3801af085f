"""Which home runs on which device and dtype, and the choice for `auto`.

`models.loader` asks here once; the object it gets is handed to the layers. A new home is one line in
`HOMES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from penstock.core.errors import StartupError
from penstock.kernels.eager.kernel_set import EagerKernels
from penstock.kernels.ops import KernelSet
from penstock.kernels.reference.kernel_set import ReferenceKernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """One implementation of all operations, and where it runs."""

    build: Callable[[], KernelSet]
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]

    def can_run(self, *, device: str, dtype: torch.dtype) -> bool:
        """True if `build()` serves this device and dtype."""
        return device in self.devices and dtype in self.dtypes


HOMES: Final[dict[str, Home]] = {
    "eager": Home(build=EagerKernels, devices=("cpu",), dtypes=(torch.float32, torch.bfloat16)),
    "reference": Home(build=ReferenceKernels, devices=("cpu",), dtypes=(torch.float32, torch.bfloat16)),
}
"""By name, the preferred first: `auto` takes the first that can run."""


def runnable(*, device: str, dtype: torch.dtype) -> list[str]:
    """Names of the homes that run on `device` with `dtype`, the preferred first."""
    return [name for name, home in HOMES.items() if home.can_run(device=device, dtype=dtype)]


def select_kernels(name: str, *, device: str, dtype: torch.dtype) -> KernelSet:
    """Build the home that `name` asks for.

    Args:
        name: `auto` or a name in `HOMES`.
        device: torch device type, e.g. `cpu`.
        dtype: of weights and activations.

    Raises:
        StartupError: it is not known or cannot run there; the message lists what can.
    """
    names = runnable(device=device, dtype=dtype)
    chosen = names[0] if name == "auto" and names else name
    if chosen not in names:
        can = ", ".join(names) or "none"
        raise StartupError(
            f"kernels is {name!r}, which cannot run on {device} with {str(dtype).removeprefix('torch.')}; "
            f"what can: {can}",
            param="kernels",
        )
    return HOMES[chosen].build()
