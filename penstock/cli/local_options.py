"""What a command may choose for a model that it loads in this process; safe to import without torch."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalOptions:
    """By the names of `serve`'s settings."""

    dtype: str = "auto"
    kernels: str = "auto"
    device: str = "auto"
    quantization: str = "none"
    max_num_seqs: int = 64


DEFAULT_OPTIONS: Final = LocalOptions()
