"""Whether the Triton kernels can run here. Safe to import where triton is not installed."""

import importlib.util
import os
from collections.abc import Mapping
from typing import Final

import torch

INTERPRET_VARIABLE: Final = "TRITON_INTERPRET"
"""Triton's own switch; it counts when triton is first imported."""


def is_interpreted(environ: Mapping[str, str] = os.environ) -> bool:
    """True if Triton runs its kernels in numpy on the CPU, one program after the other."""
    return environ.get(INTERPRET_VARIABLE) == "1"


def usable_devices(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Torch device types that the kernels can work on, whether there is one or not."""
    return ("cuda", "cpu") if is_interpreted(environ) else ("cuda",)


def why_missing() -> str | None:
    """What these kernels need and this machine lacks; None if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'penstock[gpu]')"
    if not is_interpreted() and not torch.cuda.is_available():
        return "there is no CUDA device"
    return None
