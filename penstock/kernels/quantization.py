"""What `--quantization` asks for, as the kernels see it."""

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Method: TypeAlias = Literal["none", "int8", "int4", "fp8"]
Activations: TypeAlias = Literal["int8", "bf16"]

METHODS: Final = ("none", "int8", "int4", "fp8")
INTEGER_METHODS: Final[frozenset[Method]] = frozenset({"int8", "int4"})
ROUNDED_METHODS: Final[frozenset[Method]] = frozenset({"int8", "int4", "fp8"})
"""Those with a scale for several values."""
GROUP_SIZES: Final = (32, 64, 128)
ACTIVATIONS: Final = ("int8", "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How the weights of linear layers, experts and the head are kept; the rest stays as it is."""

    method: Method = "none"
    """int8: a scale an output; int4: a scale an output and `group_size` inputs; fp8: an output, as e4m3."""
    group_size: int = 128
    """Inputs that share a scale in int4."""
    activations: Activations = "int8"
    """int8: the input of a quantized product is rounded too, with a scale a token, under fp8
    to fp8; bf16: it is not."""

    @property
    def quantizes_activations(self) -> bool:
        """True if the inputs of products are rounded."""
        return self.method != "none" and self.activations == "int8"

    def __str__(self) -> str:
        if self.method == "none":
            return "none"
        group = f", groups of {self.group_size}" if self.method == "int4" else ""
        kind = self.method if self.method == "fp8" and self.quantizes_activations else self.activations
        return f"{self.method}{group}, activations {kind}"


NO_QUANTIZATION: Final = Quantization()
