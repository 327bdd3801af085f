"""The one random number of a draw: a pure function of the answer's seed and the token's index.

There is no generator and no state, so a draw is the same in any batch, any order, after a preemption and
after a restart. The sampler calls it.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

GOLDEN_GAMMA: Final = np.uint64(0x9E3779B97F4A7C15)
MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
MIX_2: Final = np.uint64(0x94D049BB133111EB)
MANTISSA_BITS: Final = 53
MASK_64: Final = 2**64 - 1


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * MIX_1
    z = (z ^ (z >> np.uint64(27))) * MIX_2
    return z ^ (z >> np.uint64(31))


def uniforms(seeds: list[int], *, output_idxs: list[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per row, a multiple of 2^-53.

    The seed is mixed before it becomes the counter's start, so that the streams of neighbouring seeds do not
    overlap.

    **Source:** Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators (2014), section 4:
    SplitMix64, here addressed by its counter.

    Args:
        seeds: [rows] of 64 bits, signed or not.
        output_idxs: [rows], how many tokens the answer has already.

    Returns:
        [rows] float64.
    """
    return uniforms_of(stream_starts(seeds), output_idxs=output_idxs)


def stream_starts(seeds: list[int]) -> npt.NDArray[np.uint64]:
    """[rows]: where each seed's stream of numbers starts, for `uniforms_of`."""
    return _mix(np.array([seed & MASK_64 for seed in seeds], dtype=np.uint64) + GOLDEN_GAMMA)


def uniforms_of(starts: npt.NDArray[np.uint64], *, output_idxs: Sequence[int]) -> npt.NDArray[np.float64]:
    """As `uniforms`, for seeds whose streams' starts are known."""
    counter = np.array(output_idxs, dtype=np.uint64) + np.uint64(1)
    bits = _mix(starts + counter * GOLDEN_GAMMA)
    return (bits >> np.uint64(64 - MANTISSA_BITS)).astype(np.float64) * 2.0**-MANTISSA_BITS
