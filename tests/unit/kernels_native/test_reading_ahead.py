"""Threads that wait ask for what is read next: that changes no result, and outlives what it points to."""

import pytest
import torch
from torch import Tensor

from penstock.kernels.cpu import _native
from tests.unit.kernels_native.linear_case import address, input_rows, packed, random_rows

INPUTS = 128
FEATURES = 200
"""Seven panels: more tasks than threads, and fewer than eight threads."""


def chain(pool: _native.Pool, weights: list[Tensor]) -> _native.Program:
    """x @ weight for each weight in its order, each into an external buffer."""
    program = _native.Program(pool, _native.supported_isas()[-1], True)
    x = input_rows(program, INPUTS)
    for weight in weights:
        out = program.add_external(_native.DType.f32, weight.shape[0])
        _native.add_linear(program, x=x, matrices=[packed(pool, weight)], biases=[0], outs=[out], add=False)
    return program


def run(program: _native.Program, rows: Tensor, num_outs: int) -> list[Tensor]:
    outs = [torch.empty(len(rows), FEATURES) for _ in range(num_outs)]
    program.run(len(rows), [address(rows), *map(address, outs)], [])
    return outs


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("num_rows", [1, 8, 9])
def test_reading_ahead_and_the_number_of_threads_change_no_bit(threads: int, num_rows: int) -> None:
    weights = [random_rows(seed, FEATURES, INPUTS) for seed in range(3)]
    rows = random_rows(9, num_rows, INPUTS)
    alone = run(chain(_native.Pool(1, [], 0), weights), rows, len(weights))
    pool = _native.Pool(threads, [], 0)
    program, after = chain(pool, weights), chain(pool, weights[:1])
    program.set_next(after)
    after.set_next(program)
    for reads_ahead in (True, False, True):
        program.set_reads_ahead(reads_ahead)
        for _ in range(5):
            outs = run(program, rows, len(weights)) + run(after, rows, 1)
            assert all(map(torch.equal, outs, [*alone, alone[0]]))


def test_threads_may_read_ahead_of_a_program_that_is_gone() -> None:
    """The head's program names the weights of the layers'; both may go while a thread still walks through them."""
    pool = _native.Pool(3, [], 50)
    rows = random_rows(9, 1, INPUTS)
    for seed in range(20):
        weights = [random_rows(seed + i, FEATURES, INPUTS) for i in range(1 + seed % 3)]
        program = chain(pool, weights)
        program.set_next(chain(pool, weights[:1]))
        outs = run(program, rows, len(weights))
        del program
        expected = run(chain(_native.Pool(1, [], 0), weights), rows, len(weights))
        assert all(map(torch.equal, outs, expected))
