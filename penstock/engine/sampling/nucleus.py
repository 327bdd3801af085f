"""Top-p over whole rows without sorting them: a histogram finds the border, only its bucket is sorted.

For rows whose nucleus is too large for a list of candidates. `draw` calls it.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from penstock.engine.sampling.vocabulary import Doubles, Floats, Ints

LOW_BITS: Final = 20
"""Of the 32 bits of a weight; those above, exponent and 3 bits of mantissa, are its bucket."""
NUM_BUCKETS: Final = 1024
"""Weights are at most 1.0, whose bucket is 1016."""
ID_BITS: Final = 28
LOW_MASK: Final = (1 << LOW_BITS) - 1
ID_MASK: Final = (1 << ID_BITS) - 1


def keep_nucleus(values: Floats, *, top_p: Doubles) -> None:
    """Set to 0 all weights outside the shortest prefix that holds `top_p` of each row's mass.

    The prefix is of the order "weight falling, then position rising". A weight's leading bits, read as an
    integer, are a bucket that rises with the weight; the buckets' masses tell in which of them the prefix
    ends.

    ```
    bucket      1016   1015   1014   1013 ...        top_p 0.9, masses as shares of the whole
    mass        0.50   0.30   0.15   0.04
    running     0.50   0.80   0.95                    0.95 >= 0.9: the border is bucket 1014,
                              ^ border                of which the first 0.10 stays
    ```

    Args:
        values: [rows, n] float32 weights in [0, 1], changed in place; n below 2^28.
        top_p: [rows], greater than 0, at most 1.
    """
    bits = values.view(np.int32)
    buckets = bits >> LOW_BITS
    running = np.cumsum(_masses(values, buckets=buckets)[:, ::-1], axis=1)
    shares = top_p * running[:, -1]
    steps = np.minimum((running < shares[:, None]).sum(axis=1), NUM_BUCKETS - 1)
    rows = np.arange(len(values))
    before = np.where(steps > 0, running[rows, steps - 1], 0.0)
    border = (NUM_BUCKETS - 1 - steps).astype(np.int32)[:, None]
    in_border = np.flatnonzero(buckets == border)
    values *= buckets >= border
    _cut_border(values, places=in_border, rests=shares - before)


def _masses(values: Floats, *, buckets: npt.NDArray[np.int32]) -> Doubles:
    """[rows, NUM_BUCKETS]: sums over each row's buckets, each in the order of positions."""
    num_rows = len(values)
    offsets = np.arange(num_rows)[:, None] * NUM_BUCKETS
    # bincount converts other types than these by itself, at six times the price
    bins, weights = (buckets + offsets).ravel(), values.ravel().astype(np.float64)
    masses = np.bincount(bins, weights=weights, minlength=num_rows * NUM_BUCKETS)
    return masses.astype(np.float64, copy=False).reshape(num_rows, NUM_BUCKETS)


def _cut_border(values: Floats, *, places: Ints, rests: Doubles) -> None:
    """Set to 0 what lies behind the first `rests` of mass in the border buckets.

    Args:
        values: [rows, n], changed in place.
        places: flat indices of the border buckets' members, rising.
        rests: [rows], mass that stays.
    """
    flat = values.ravel()
    rows, ids = np.divmod(places, values.shape[1])
    low = flat.view(np.int32)[places].astype(np.int64) & LOW_MASK
    keys = np.sort((((rows << LOW_BITS) | (LOW_MASK - low)) << ID_BITS) | ids)
    ordered = (keys >> (LOW_BITS + ID_BITS)) * values.shape[1] + (keys & ID_MASK)
    weights = flat[ordered].astype(np.float64)
    ends = np.searchsorted(rows, np.arange(len(values)), side="right").tolist()
    start = 0
    for end, rest in zip(ends, rests.tolist(), strict=True):
        running = np.cumsum(weights[start:end])
        flat[ordered[start + int(np.searchsorted(running, rest)) + 1 : end]] = 0.0
        start = end
