"""One dense operation by a named instruction set, on tensors."""

from collections.abc import Callable

import torch
from torch import Tensor

from penstock.kernels.cpu import _native

ISAS = _native.supported_isas()

DTYPES = {
    torch.bfloat16: _native.DType.bf16,
    torch.float32: _native.DType.f32,
    torch.int8: _native.DType.i8,
    torch.int32: _native.DType.i32,
    torch.int64: _native.DType.i64,
}

POOLS = {threads: _native.Pool(threads, [], 0) for threads in (1, 2)}

COLS = (1, 2, 5, 15, 16, 17, 31, 33, 63, 64, 65, 77, 100, 128, 200, 896, 1100, 2049, 4864)
ROWS = (1, 2, 3, 5, 9, 33)


def guarded(num_rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """[num_rows, cols] inside a larger tensor of 7, so that a write past a row's end shows."""
    return torch.full((num_rows, cols + 3), 7, dtype=dtype)[:, :cols]


def guard_is_whole(tensor: Tensor) -> bool:
    """Whether what lies between the rows of a `guarded` tensor is untouched."""
    whole = tensor.as_strided((tensor.shape[0], tensor.stride(0)), tensor.stride())
    return bool((whole[:, tensor.shape[1] :] == 7).all())


def run(isa: str, *tensors: Tensor, add: Callable[..., None], threads: int = 2) -> None:
    """Run the operation that `add(program, *refs)` appends, over the rows of the tensors."""
    program = _native.Program(POOLS[threads], isa, deterministic=False)
    refs = [program.add_external(DTYPES[tensor.dtype], tensor.shape[1]) for tensor in tensors]
    add(program, *refs)
    places = [(tensor.data_ptr(), tensor.stride(0) * tensor.element_size()) for tensor in tensors]
    program.run(tensors[0].shape[0], places, [])


def random(seed: int, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normally distributed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def rounding(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a result of that dtype may be from the float64 one: its rounding, and 3e-6 for float32's sums."""
    relative = 2.0**-8 if dtype is torch.bfloat16 else 0.0
    return expected.abs() * (relative + 3e-6) + 3e-6


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """expected: float64."""
    wrong = (actual.double() - expected).abs() > rounding(expected, actual.dtype)
    assert not wrong.any(), (actual[wrong][:4], expected[wrong][:4])
