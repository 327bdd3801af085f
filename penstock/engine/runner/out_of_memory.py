"""Which exceptions mean that memory could not be had, on whichever device.

Everybody who must tell them from other faults asks here.
"""

from typing import Final

import torch

WORDS: Final = (
    "not enough memory",
    "can't allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""In messages of a plain `RuntimeError`: torch's CPU allocator and CUDA's libraries raise no other."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if `error` says that an allocation failed.

    `MemoryError` is Python's, numpy's and that of C++ (`std::bad_alloc`, by nanobind);
    `torch.OutOfMemoryError` is CUDA's.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)
