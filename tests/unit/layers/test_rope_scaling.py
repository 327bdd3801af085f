"""Rotation frequencies by kind of scaling, on numbers that can be checked by hand."""

import math

import pytest
import torch

from penstock.kernels.registry import select_kernels
from penstock.layers.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NoScaling,
    Rope,
    RopeAngles,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)

KERNELS = select_kernels("reference", device="cpu", dtype=torch.float32)


def rope(scaling: RopeScaling, *, theta: float = 100.0, rotary_dim: int = 4) -> Rope:
    return Rope(RopeSpec(theta=theta, rotary_dim=rotary_dim, scaling=scaling), kernels=KERNELS)


def cosines(angles: RopeAngles) -> torch.Tensor:
    return angles.values[:, : angles.values.shape[1] // 2]


def test_plain_angles_are_position_times_theta_to_the_minus_i_over_d() -> None:
    angles = rope(NoScaling()).angles(torch.tensor([0, 3]))
    assert cosines(angles).tolist() == [[1.0, 1.0], pytest.approx([math.cos(3), math.cos(0.3)])]
    assert angles.values[1, 2:].tolist() == pytest.approx([math.sin(3), math.sin(0.3)])


def test_linear_scaling_divides_positions() -> None:
    scaled = rope(LinearScaling(factor=4.0)).angles(torch.tensor([8]))
    assert torch.allclose(scaled.values, rope(NoScaling()).angles(torch.tensor([2])).values)


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=100)
    waves = torch.tensor([10.0, 40.0, 1000.0])  # against a context of 100: 10 turns, 2.5, 0.1
    got = 2 * math.pi / scaling.stretch(2 * math.pi / waves, theta=100.0)
    blended = 1 / (0.5 / (40 * 8) + 0.5 / 40)
    assert got.tolist() == pytest.approx([10.0, blended, 8000.0])


def test_yarn_keeps_what_turns_often_and_interpolates_the_rest() -> None:
    scaling = YarnScaling(
        factor=4.0, original_max_len=1000, attention_factor=1.25, beta_fast=32.0, beta_slow=1.0, truncate=True
    )
    plain = 1.0 / 10_000.0 ** (torch.arange(0, 64, 2) / 64)
    got = scaling.stretch(plain, theta=10_000.0) / plain
    assert got[0] == 1.0
    assert got[-1] == pytest.approx(0.25)
    assert bool((got[1:] <= got[:-1]).all())
    assert cosines(rope(scaling).angles(torch.tensor([0])))[0, 0] == 1.25


def test_longrope_divides_each_frequency_by_its_own_factor() -> None:
    scaling = LongRopeScaling(factors=(1.0, 2.0), attention_factor=1.5)
    angles = rope(scaling).angles(torch.tensor([4]))
    assert cosines(angles)[0].tolist() == pytest.approx([1.5 * math.cos(4), 1.5 * math.cos(0.2)])


def test_an_angle_does_not_depend_on_its_place_in_the_step() -> None:
    """Vectorised cosines differ in the last bit between the body and the tail of an array."""
    table = rope(NoScaling(), rotary_dim=6).angles(torch.arange(500))
    for place in (0, 1, 77, 499):
        alone = rope(NoScaling(), rotary_dim=6).angles(torch.tensor([place]))
        assert torch.equal(alone.values[0], table.values[place])
