"""What the kernels are told at start, beside device and dtype; `engine/loading` makes it from its config."""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import torch

from penstock.kernels.quantization import NO_QUANTIZATION, Quantization

KvCacheDtype: TypeAlias = Literal["auto", "bfloat16", "int8", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOptions:
    """Options that homes may differ in serving."""

    quantization: Quantization = NO_QUANTIZATION
    """Of the weights of linear layers, experts and the head."""
    kv_cache_dtype: KvCacheDtype = "auto"
    """auto keeps the model's dtype; fp8 is e4m3."""
    block_size: int = 16
    """Token slots in a KV block."""
    head_dim: int | None = None
    """Of the model; None if it is not known yet."""
    num_threads: int | None = None
    """Threads that compute; None takes the CPUs of this process, or what `OMP_NUM_THREADS` says."""
    cpus: tuple[int, ...] = ()
    """Where thread i is pinned, in turns; none leaves the placement to the kernel."""
    is_deterministic: bool = False
    """A row's result may not depend on other rows, on chunks or on the number of threads."""
    isa: str = "auto"
    """Instruction set of the native kernels; auto takes `PENSTOCK_ISA`, or the best that there is."""

    enable_lora: bool = False
    """Adapters may act on the products of the model's linear layers."""

    def kv_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """What keys and values are kept in."""
        kinds = {
            "auto": model_dtype,
            "bfloat16": torch.bfloat16,
            "int8": torch.int8,
            "fp8": torch.float8_e4m3fn,
        }
        return kinds[self.kv_cache_dtype]


DEFAULT_OPTIONS: Final = KernelOptions()
