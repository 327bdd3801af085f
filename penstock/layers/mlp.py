"""Feed-forward layers."""

from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from penstock.kernels import ops
from penstock.layers.linear import Linear, Linears


class Activation(Enum):
    """The non-linearity, by the names that `config.json` files use for it."""

    SILU = ("silu", "swish")
    GELU = ("gelu",)
    GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")

    def gated(self, kernels: ops.KernelSet, gate: Tensor, up: Tensor) -> Tensor:
        """`activation(gate) * up`, all [T, intermediate_size]."""
        if self is Activation.SILU:
            return ops.silu_and_mul(kernels, gate, up)
        return ops.gelu_and_mul(kernels, gate, up, tanh=self is Activation.GELU_TANH)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedMlp:
    """`down(activation(gate(x)) * up(x))`."""

    gate_up: Linears
    """Gate, then up."""
    down: Linear
    activation: Activation

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden_size] to the same shape."""
        gate, up = self.gate_up(x)
        return self.down(self.activation.gated(self.down.kernels, gate, up))


@dataclass(frozen=True, slots=True, kw_only=True)
class GeluMlp:
    """`down(gelu(up(x)))` with the tanh form (GPT-2)."""

    up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden_size] to the same shape."""
        return self.down(ops.gelu(self.up.kernels, self.up(x), tanh=True))
