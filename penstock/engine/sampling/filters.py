"""Top-k, top-p and min-p as lengths of a prefix: how many of the first tokens of a row stay.

All three keep a prefix of the row in its one order (logit falling, then id rising), so together they keep
the shortest of the three. They are applied in the order top-k, top-p, min-p; top-p measures its mass among
what top-k kept. Pure functions; `draw` calls them.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

EVERYTHING: Final = np.iinfo(np.int64).max
"""A filter that drops nothing, or nothing among the candidates it has seen."""


def top_k_lengths(top_k: Ints, *, vocab_size: int) -> Ints:
    """Keep the k likeliest; among equal logits at the border those with the lowest ids: never more than k.

    Args:
        top_k: [rows]; 0, -1 and anything from the vocabulary's size up keep all.
        vocab_size: tokens in a row.

    Returns:
        [rows], `EVERYTHING` where nothing is dropped.
    """
    return np.where((top_k <= 0) | (top_k >= vocab_size), EVERYTHING, top_k)


def top_p_lengths(mass: Doubles, *, totals: Doubles, top_p: Doubles) -> Ints:
    """Keep the shortest prefix whose mass reaches `top_p` of the total; at least one token.

    **Source:** Holtzman et al., The Curious Case of Neural Text Degeneration (2020), section 3.1.

    Args:
        mass: [rows, candidates], running sums of the weights.
        totals: [rows], the mass of which `top_p` is a share.
        top_p: [rows], greater than 0; 1 keeps all.

    Returns:
        [rows], `EVERYTHING` where the candidates do not reach the share.
    """
    lengths = 1 + (mass < (top_p * totals)[:, None]).sum(axis=1)
    return np.where((top_p >= 1.0) | (lengths > mass.shape[1]), EVERYTHING, lengths)


def min_p_lengths(weights: Doubles, *, min_p: Doubles) -> Ints:
    """Keep tokens at least `min_p` times as likely as the likeliest.

    **Source:** Nguyen et al., Turning Up the Heat: Min-p Sampling (2024), section 3.

    Args:
        weights: [rows, candidates], falling, the first being 1.
        min_p: [rows], 0 to 1; 0 keeps all.

    Returns:
        [rows], `EVERYTHING` where no candidate is dropped.
    """
    lengths = (weights >= min_p[:, None]).sum(axis=1)
    return np.where(lengths == weights.shape[1], EVERYTHING, lengths)
