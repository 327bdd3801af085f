"""Mixtures of experts against float64, on every instruction set and every weight format."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from penstock.kernels.cpu import _native

POOLS = {threads: _native.Pool(threads, [], 0) for threads in (1, 2)}

BF16 = _native.DType.bf16

every_isa = pytest.mark.parametrize("isa", _native.supported_isas())


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    hidden: int
    inner: int
    num_experts: int
    top_k: int
    renormalize: bool = True


SHAPES = [
    Shape(hidden=64, inner=64, num_experts=4, top_k=2),
    Shape(hidden=100, inner=70, num_experts=8, top_k=3, renormalize=False),
    Shape(hidden=128, inner=96, num_experts=5, top_k=1, renormalize=False),
    Shape(hidden=200, inner=33, num_experts=33, top_k=4),
    Shape(hidden=65, inner=31, num_experts=2, top_k=2),
]

FORMATS = [("bf16", False), ("int8", True), ("int4", True)]
"""Weight format, and whether activations are int8."""

TOLERANCES = {"bf16": 0.01, "int8": 0.04, "int4": 0.04}
"""Of the largest result: bf16 between the products; int8 rows of few values, each up to 1/254 of the largest off."""


def weight(generator, out_features, in_features):
    return (torch.randn(out_features, in_features, generator=generator) / in_features**0.5).bfloat16()


def packed(source: Tensor, weight_format: str) -> _native.Matrix:
    return _native.pack(
        POOLS[1],
        data=source.data_ptr(),
        dtype=BF16,
        row_stride=source.stride(0),
        col_stride=1,
        out_features=source.shape[0],
        in_features=source.shape[1],
        format=weight_format,
        group_size=32 if weight_format == "int4" else 0,
    )


def unpacked(matrix: _native.Matrix) -> Tensor:
    out = torch.empty(matrix.out_features, matrix.in_features)
    matrix.unpack(out.data_ptr())
    return out.double()


class Layer:
    """A mixture, packed, with its program and its float64 form."""

    def __init__(self, shape, *, isa, weight_format, quantize, threads=2, add=False, router_scale=1.0):
        generator = torch.Generator().manual_seed(shape.hidden)
        sizes = ((shape.inner, shape.hidden), (shape.inner, shape.hidden), (shape.hidden, shape.inner))
        self.shape = shape
        self.router = weight(generator, shape.num_experts, shape.hidden) * router_scale
        self.experts = [
            tuple(packed(weight(generator, *size), weight_format) for size in sizes)
            for _ in range(shape.num_experts)
        ]
        self.program = _native.Program(POOLS[threads], isa, deterministic=False)
        given = self.program.add_external(BF16, shape.hidden)
        x = self.program.add_buffer(BF16, shape.hidden)
        _native.add_convert(self.program, x=given, out=x)
        _native.add_moe(
            self.program,
            x=x,
            router=self.router.data_ptr(),
            num_experts=shape.num_experts,
            experts=self.experts,
            top_k=shape.top_k,
            renormalize=shape.renormalize,
            activation="silu",
            quantize=quantize,
            out=self.program.add_external(_native.DType.f32, shape.hidden),
            add=add,
        )

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        places = [(tensor.data_ptr(), tensor.stride(0) * tensor.element_size()) for tensor in (x, out)]
        self.program.run(len(x), places, [])
        return out

    def exact(self, x: Tensor) -> Tensor:
        wide = x.double()
        weights, chosen = torch.softmax(wide @ self.router.double().T, -1).topk(self.shape.top_k, -1)
        if self.shape.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(wide)
        for expert_id, matrices in enumerate(self.experts):
            gate, up, down = (unpacked(matrix) for matrix in matrices)
            share = (weights * (chosen == expert_id)).sum(-1, keepdim=True)
            out += share * ((torch.nn.functional.silu(wide @ gate.T) * (wide @ up.T)) @ down.T)
        return out


def rows(num_rows: int, cols: int) -> Tensor:
    return torch.randn(num_rows, cols, generator=torch.Generator().manual_seed(cols)).bfloat16()


@every_isa
@pytest.mark.parametrize(("weight_format", "quantize"), FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_get_their_experts_sum(isa, weight_format, quantize, shape):
    layer = Layer(shape, isa=isa, weight_format=weight_format, quantize=quantize)
    x = rows(130, shape.hidden)
    expected = layer.exact(x)
    for num_rows in (1, 2, 7, 33, 130):
        out = layer(x[:num_rows], torch.full((num_rows, shape.hidden), 7.0))
        error = (out - expected[:num_rows]).abs().max() / expected.abs().max()
        assert error < TOLERANCES[weight_format]


@every_isa
@pytest.mark.parametrize(("weight_format", "quantize"), FORMATS)
def test_a_token_has_the_same_bits_alone_and_in_company(isa, weight_format, quantize):
    shape = SHAPES[3]
    layers = [
        Layer(shape, isa=isa, weight_format=weight_format, quantize=quantize, threads=threads)
        for threads in (1, 2)
    ]
    x = rows(40, shape.hidden)
    together = layers[1](x, torch.zeros(40, shape.hidden))
    alone = torch.zeros(40, shape.hidden)
    for row in range(40):
        layers[0](x[row : row + 1], alone[row : row + 1])
    assert torch.equal(together, alone)


@every_isa
def test_more_tokens_than_are_worked_on_together(isa):
    shape = SHAPES[0]
    layer = Layer(shape, isa=isa, weight_format="bf16", quantize=False)
    x = rows(7, shape.hidden).repeat(300, 1)
    out = layer(x, torch.zeros(2100, shape.hidden))
    assert torch.equal(out, out[:7].repeat(300, 1))


@every_isa
def test_the_sum_is_added_to_a_residual(isa):
    shape = SHAPES[1]
    plain = Layer(shape, isa=isa, weight_format="bf16", quantize=False)
    added = Layer(shape, isa=isa, weight_format="bf16", quantize=False, add=True)
    x, residual = rows(9, shape.hidden), torch.randn(9, shape.hidden)
    expected = residual + plain(x, torch.zeros(9, shape.hidden))
    assert torch.equal(added(x, residual.clone()), expected)


@every_isa
def test_equal_experts_go_to_the_lowest_id(isa):
    """A router of zeros makes all experts equal, so the first two share the token by halves."""
    shape = SHAPES[0]
    layer = Layer(shape, isa=isa, weight_format="bf16", quantize=False, router_scale=0.0)
    wide = rows(3, shape.hidden).double()
    out = layer(wide.bfloat16(), torch.zeros(3, shape.hidden))
    halves = [[unpacked(matrix) for matrix in expert] for expert in layer.experts[:2]]
    expected = sum((torch.nn.functional.silu(wide @ g.T) * (wide @ u.T)) @ d.T for g, u, d in halves) / 2
    assert (out - expected).abs().max() / expected.abs().max() < TOLERANCES["bf16"]


@every_isa
def test_a_token_that_is_no_number_spoils_itself_alone(isa):
    shape = SHAPES[1]
    layer = Layer(shape, isa=isa, weight_format="bf16", quantize=False)
    x = rows(5, shape.hidden)
    clean = layer(x, torch.zeros(5, shape.hidden)).clone()
    x[2, 7] = float("nan")
    out = layer(x, torch.zeros(5, shape.hidden))
    assert out[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize(
    ("change", "message"), [({"top_k": 5}, "top_k"), ({"quantize": True}, "not quantized ones")]
)
def test_what_does_not_fit_is_refused(change, message):
    shape = SHAPES[0]
    layer = Layer(shape, isa="scalar", weight_format="bf16", quantize=False)
    program = _native.Program(POOLS[1], "scalar", deterministic=False)
    x, out = program.add_external(BF16, 64), program.add_external(_native.DType.f32, 64)
    arguments = {
        "x": x,
        "router": layer.router.data_ptr(),
        "num_experts": 4,
        "experts": layer.experts,
        "top_k": 2,
        "renormalize": True,
        "activation": "silu",
        "quantize": False,
        "out": out,
        "add": False,
    }
    with pytest.raises(ValueError, match=message):
        _native.add_moe(program, **(arguments | change))
