"""Rotary position embedding: frequencies by kind of scaling, and the angles of a step.

A `Rope` is built once by a model from its config; `angles` runs once a step and serves all layers that
share it. Where the config is read (`models/rope_config`)
a kind of scaling that is not here is refused by name.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from penstock.kernels import ops


class RopeScaling(Protocol):
    """How a model was stretched beyond its first context."""

    def stretch(self, frequencies: Tensor, *, theta: float) -> Tensor:
        """New frequencies [R / 2] float32 from the plain ones."""
        ...

    @property
    def attention_factor(self) -> float:
        """Factor on cos and sin."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NoScaling:
    """The plain frequencies."""

    attention_factor: ClassVar[float] = 1.0

    def stretch(self, frequencies: Tensor, *, theta: float) -> Tensor:
        """The same."""
        del theta
        return frequencies


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Positions are divided by a factor.

    **Source:** Chen et al., Extending Context Window via Positional Interpolation, 2023, equation 4.
    """

    factor: float
    attention_factor: ClassVar[float] = 1.0

    def stretch(self, frequencies: Tensor, *, theta: float) -> Tensor:
        """All frequencies over the factor."""
        del theta
        return frequencies / self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Long waves are stretched, short ones kept, those between are blended.

    **Source:** Meta, The Llama 3 Herd of Models, 2024, and the code of its release.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int
    """Context of pre-training, in tokens."""
    attention_factor: ClassVar[float] = 1.0

    def stretch(self, frequencies: Tensor, *, theta: float) -> Tensor:
        """`blend` is 0 for waves longer than the context over `low_freq_factor`, 1 for short ones."""
        del theta
        waves = self.original_max_len * frequencies / (2 * math.pi)
        blend = (waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = blend.clamp(0, 1)
        return (1 - blend) * frequencies / self.factor + blend * frequencies


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """Dimensions that turn often are kept, slow ones interpolated, with a ramp between.

    **Source:** Peng et al., YaRN, 2023, sections 3.2 to 3.4.
    """

    factor: float
    original_max_len: int
    """Context of pre-training, in tokens."""
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    """Round the ends of the ramp to whole dimensions."""

    def _dimension(self, turns: float, *, size: int, theta: float) -> float:
        # The dimension that makes `turns` full turns within the first context.
        return size * math.log(self.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def stretch(self, frequencies: Tensor, *, theta: float) -> Tensor:
        """`ramp` is 0 where the plain frequency stays and 1 where it is interpolated."""
        size = 2 * frequencies.shape[0]
        low = self._dimension(self.beta_fast, size=size, theta=theta)
        high = self._dimension(self.beta_slow, size=size, theta=theta)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        if low == high:
            high += 0.001  # an empty ramp would divide by zero
        steps = torch.arange(frequencies.shape[0], dtype=torch.float32)
        ramp = ((steps - low) / (high - low)).clamp(0, 1)
        return frequencies / self.factor * ramp + frequencies * (1 - ramp)


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRopeScaling:
    """Each dimension has its own factor, one set for short and one for long contexts.

    The set is chosen once, by the longest context that is served: were it chosen by the length of each
    sequence, its cached keys would turn wrong when it crosses the limit.

    **Source:** Ding et al., LongRoPE, 2024, section 3.
    """

    factors: tuple[float, ...]
    """R / 2 divisors."""
    attention_factor: float

    def stretch(self, frequencies: Tensor, *, theta: float) -> Tensor:
        """Each frequency over its own factor."""
        del theta
        return frequencies / torch.tensor(self.factors, dtype=torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeAngles:
    """The angles of a step's tokens."""

    kernels: ops.KernelSet
    values: Tensor
    """[T, R] float32: cosines, then sines."""

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [T, H, D] and keys [T, N, D], rotated."""
        return ops.rope(self.kernels, query, key, self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """What a config says about rotation."""

    theta: float
    """Base of the wavelengths, above 1."""
    rotary_dim: int
    """Rotated dimensions of a head, even; the rest passes."""
    scaling: RopeScaling


class Rope:
    """Angles by position for the layers that share one `RopeSpec`."""

    def __init__(self, spec: RopeSpec, *, kernels: ops.KernelSet) -> None:
        exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim
        self._kernels = kernels
        self._frequencies = spec.scaling.stretch(1.0 / spec.theta**exponents, theta=spec.theta)
        self._factor = spec.scaling.attention_factor

    def angles(self, positions: Tensor) -> RopeAngles:
        """Angles of a step's positions [T] int64, 0 or more."""
        if positions.is_cuda and not self._frequencies.is_cuda:  # once, before any step that is captured
            self._frequencies = self._frequencies.to(positions.device)
        values = ops.rope_angles(self._kernels, positions, self._frequencies, factor=self._factor)
        return RopeAngles(kernels=self._kernels, values=values)
