"""Reads what a config says about rotary embedding, in the old and the new spelling.

Old: `rope_theta` and `rope_scaling` beside each other. New: one object `rope_parameters`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from penstock.core.errors import UnsupportedModelError
from penstock.layers.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NoScaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)
from penstock.models.config import ConfigReader, DecoderShape


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeContext:
    """What the scaling rules need beside their own fields."""

    rotary_dim: int
    original_max_len: int
    """Context of pre-training, in tokens."""
    max_position_embeddings: int
    served_max_len: int
    """Longest context that will be served."""


def _no_scaling(reader: ConfigReader, context: RopeContext) -> RopeScaling:
    del reader, context
    return NoScaling()


def _linear(reader: ConfigReader, context: RopeContext) -> RopeScaling:
    del context
    return LinearScaling(factor=reader.number("factor", low=1e-6))


def _llama3(reader: ConfigReader, context: RopeContext) -> RopeScaling:
    low = reader.number("low_freq_factor", low=1e-6)
    high = reader.number("high_freq_factor", low=1e-6)
    if high <= low:
        raise reader.wrong("high_freq_factor", f"a number above low_freq_factor ({low:g})")
    return Llama3Scaling(
        factor=reader.number("factor", low=1e-6),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_len=context.original_max_len,
    )


def _yarn_attention_factor(reader: ConfigReader, factor: float) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = reader.optional_number("attention_factor", low=1e-6)
    if given is not None:
        return given
    scale, all_dim = reader.optional_number("mscale"), reader.optional_number("mscale_all_dim")
    return mscale(scale) / mscale(all_dim) if scale and all_dim else mscale(1.0)


def _yarn(reader: ConfigReader, context: RopeContext) -> RopeScaling:
    if reader.has("long_factor"):  # the first Phi-3 files call LongRoPE so
        return _longrope(reader, context)
    default = context.max_position_embeddings / context.original_max_len
    factor = reader.number("factor", default, low=1e-6)
    return YarnScaling(
        factor=factor,
        original_max_len=context.original_max_len,
        attention_factor=_yarn_attention_factor(reader, factor),
        beta_fast=reader.number("beta_fast", 32.0, low=1e-6),
        beta_slow=reader.number("beta_slow", 1.0, low=1e-6),
        truncate=reader.boolean("truncate", True),
    )


def _longrope(reader: ConfigReader, context: RopeContext) -> RopeScaling:
    factor = reader.number("factor", context.max_position_embeddings / context.original_max_len, low=1e-6)
    default = 1.0
    if factor > 1:
        default = math.sqrt(1 + math.log(factor) / math.log(context.original_max_len))
    is_long = context.served_max_len > context.original_max_len
    factors = {
        name: reader.numbers(name, length=context.rotary_dim // 2) for name in ("short_factor", "long_factor")
    }
    return LongRopeScaling(
        factors=factors["long_factor" if is_long else "short_factor"],
        attention_factor=reader.number("attention_factor", default, low=1e-6),
    )


SCALINGS: Final[Mapping[str, Callable[[ConfigReader, RopeContext], RopeScaling]]] = {
    "default": _no_scaling,
    # Dynamic NTK scales only beyond max_position_embeddings, and no longer context is served.
    "dynamic": _no_scaling,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
}
"""By the config's word for the kind."""


def _parameters(reader: ConfigReader) -> ConfigReader:
    return reader.section("rope_parameters" if reader.has("rope_parameters") else "rope_scaling")


def read_rope_section(
    reader: ConfigReader,
    parameters: ConfigReader,
    *,
    shape: DecoderShape,
    theta: float,
    served_max_len: int | None = None,
) -> RopeSpec:
    """Read one object of rope parameters.

    Args:
        reader: the whole `config.json`, for fields that some families keep outside.
        parameters: the object itself; empty means plain rotation.
        shape: sizes of the model.
        theta: if the object names none.
        served_max_len: longest context that will be served; None takes the model's.

    Raises:
        CheckpointError: a field is missing or out of range.
        UnsupportedModelError: the kind is not known; the message lists what is.
    """
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    if kind not in SCALINGS:
        raise UnsupportedModelError(
            f"{parameters.source}: rope type {kind!r} is not supported; known: {', '.join(SCALINGS)}",
            param="rope_type",
        )
    outer = reader.number("partial_rotary_factor", 1.0, low=0.01, high=1.0)
    share = parameters.number("partial_rotary_factor", outer, low=0.01, high=1.0)
    original = parameters.integer("original_max_position_embeddings", shape.max_position_embeddings, low=2)
    rotary_dim = int(shape.head_dim * share)
    if rotary_dim % 2:
        raise parameters.wrong("partial_rotary_factor", f"an even share of head_dim ({shape.head_dim})")
    context = RopeContext(
        rotary_dim=rotary_dim,
        original_max_len=reader.integer("original_max_position_embeddings", original, low=2),
        max_position_embeddings=shape.max_position_embeddings,
        served_max_len=served_max_len or shape.max_position_embeddings,
    )
    return RopeSpec(
        theta=parameters.number("rope_theta", theta, low=1.0001),
        rotary_dim=context.rotary_dim,
        scaling=SCALINGS[kind](parameters, context),
    )


def read_rope(
    reader: ConfigReader, *, shape: DecoderShape, theta: float = 10_000.0, served_max_len: int | None = None
) -> RopeSpec:
    """Read the rope parameters of a model with one kind of rotation.

    Args:
        reader: the `config.json`.
        shape: sizes of the model.
        theta: if the config names none.
        served_max_len: as in `read_rope_section`.

    Raises:
        As `read_rope_section`.
    """
    theta = reader.number("rope_theta", theta, low=1.0001)
    return read_rope_section(
        reader, _parameters(reader), shape=shape, theta=theta, served_max_len=served_max_len
    )
