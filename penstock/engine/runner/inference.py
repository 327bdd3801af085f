"""Torch without gradients, around everything that computes."""

from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch

ENTERED: Final = nullcontext()


def inference_mode() -> AbstractContextManager[object]:
    """Torch's own; nothing where the engine's loop has entered that already.

    To enter it at each step would cost a tenth of a millisecond.
    """
    return ENTERED if torch.is_inference_mode_enabled() else torch.inference_mode()
