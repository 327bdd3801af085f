"""Where a model computes: the CPU, or a CUDA device that torch and Triton can use; what `auto` takes and why.

Asked once at start, by `engine/build`, and by `penstock doctor`. Nothing is allocated here.
"""

import importlib.util
from dataclasses import dataclass
from typing import Final

import torch

from penstock.core.errors import StartupError
from penstock.kernels.registry import HOMES

CPU: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceChoice:
    """A device and why it was taken."""

    device: torch.device
    reason: str

    @property
    def detail(self) -> str:
        """The chip's name where it has one, and the reason."""
        if self.device.type != "cuda":
            return self.reason
        return f"{torch.cuda.get_device_name(self.device)}, {self.reason}"


def why_no_cuda() -> str | None:
    """What keeps CUDA from being used at all; None if nothing does."""
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (driver missing, or CUDA_VISIBLE_DEVICES hides it)"
    return None


def why_no_triton() -> str | None:
    """Why there are no kernels for CUDA; None if there are."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'penstock[gpu]')"
    return None


def choose_device(asked: str, *, kernels: str = "auto", index: int = 0) -> DeviceChoice:
    """The device for `--device` and `--kernels`.

    Args:
        asked: `auto`, `cpu` or `cuda`.
        kernels: `auto` or a name in `registry.HOMES`; a set that runs on the CPU alone makes `auto` take it.
        index: which of the CUDA devices that torch sees; a rank's number.

    Raises:
        StartupError: `cuda` is asked for and cannot be used; names what is missing and what can run instead.
    """
    if asked == "cpu":
        return DeviceChoice(device=CPU, reason="asked for")
    missing = _missing(kernels, index=index)
    if missing is None:
        reason = "asked for" if asked == "cuda" else "torch sees a CUDA device and triton is installed"
        return DeviceChoice(device=torch.device("cuda", index), reason=reason)
    if asked == "cuda":
        raise StartupError(f"device is 'cuda': {missing}; --device cpu runs here", param="device")
    return DeviceChoice(device=CPU, reason=missing)


def _missing(kernels: str, *, index: int) -> str | None:
    on_cuda = [name for name, home in HOMES.items() if "cuda" in home.devices]
    if kernels in HOMES and kernels not in on_cuda:
        return f"kernels {kernels} run on the CPU alone (on CUDA: {', '.join(on_cuda) or 'none'})"
    missing = why_no_cuda() or why_no_triton()
    if missing is None and index >= torch.cuda.device_count():
        return f"CUDA device {index} is asked for, torch sees {torch.cuda.device_count()}"
    return missing
