"""Passes over whole rows of the vocabulary: the largest tokens and the softmax's weights.

These are the only places where the cost grows with the vocabulary; a native or device sampler replaces
this file. No parameters of requests and no randomness here. `draw` and `logprobs` call it.

Legend: R rows, V vocabulary, K candidates, B block.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MASK_31: Final = np.int32(0x7FFFFFFF)
MASK_32: Final = np.int64(0xFFFFFFFF)
LAST_KEY: Final = np.iinfo(np.int64).max
BLOCK: Final = 64
"""Tokens whose maximum stands for them in the search for candidates: two cache lines of float32 and more
than enough to make the maxima a small part of the row."""
MIN_BLOCKS_PER_CANDIDATE: Final = 4
"""With fewer blocks than this per candidate, most of the row would be gathered anyway."""
LANES: Final = 32
"""Tokens that are summed in float32 before float64 takes over: keeps the error of a sum below 1e-6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The first tokens of each row in the order of `order_keys`."""

    values: Floats
    """[R, K], never rising."""
    ids: Ints
    """[R, K]; ids with equal values rise."""

    @property
    def num(self) -> int:
        """K."""
        return int(self.ids.shape[1])


def order_keys(values: Floats, *, ids: Ints) -> Ints:
    """Integers that order tokens by logit, highest first, and by id, lowest first, where logits are equal.

    A smaller key comes first. Equal logits are common (bfloat16), and a total order makes every filter exact.

    ```
    key = [ 32 bits: the float as an ordered integer, complemented | 32 bits: id ]
    ```

    Args:
        values: [R, n] float32, no NaN.
        ids: integers below 2^32, broadcast against `values`.

    Returns:
        [R, n] int64.
    """
    bits = (values + np.float32(0)).view(np.int32)  # adding 0 makes -0.0 equal to 0.0
    keys = (~bits ^ ((bits >> 31) & MASK_31)).astype(np.int64)
    keys <<= 32
    keys |= ids
    return keys


def _from_keys(keys: Ints) -> Candidates:
    bits = ~(keys >> 32).astype(np.int32)
    values = (bits ^ ((bits >> 31) & MASK_31)).view(np.float32)
    return Candidates(values=values, ids=keys & MASK_32)


def _first(keys: Ints, *, k: int) -> Ints:
    """[R, k]: the smallest keys of each row, rising."""
    if k < keys.shape[1]:
        keys = np.partition(keys, k - 1, axis=1)[:, :k]
    return np.sort(keys, axis=1)


def top_candidates(logits: Floats, *, k: int) -> Candidates:
    """The first `k` tokens of each row in the order of `order_keys`, without sorting the vocabulary.

    In a large vocabulary only the `k` best blocks of `BLOCK` tokens are looked into, best by (maximum,
    lowest index). They hold all candidates: if token t lay in another block, each of the `k` blocks would
    hold a token (its maximum) that comes before t.

    Args:
        logits: [R, V] float32, no NaN.
        k: 1 or more; cut to V.

    Returns:
        [R, min(k, V)] values and ids.
    """
    vocab_size = logits.shape[1]
    k = min(k, vocab_size)
    if vocab_size < k * BLOCK * MIN_BLOCKS_PER_CANDIDATE:
        keys = order_keys(logits, ids=np.arange(vocab_size))
    else:
        keys = _keys_in_best_blocks(logits, k=k)
    return _from_keys(_first(keys, k=k))


def _keys_in_best_blocks(logits: Floats, *, k: int) -> Ints:
    """[R, k * BLOCK] keys of the tokens in the k best blocks of each row."""
    num_rows, vocab_size = logits.shape
    maxima = _block_maxima(logits)
    best = _first(order_keys(maxima, ids=np.arange(maxima.shape[1])), k=k)
    ids = (_from_keys(best).ids[:, :, None] * BLOCK + np.arange(BLOCK)).reshape(num_rows, -1)
    values = np.take_along_axis(logits, np.minimum(ids, vocab_size - 1), axis=1)
    keys = order_keys(values, ids=ids)
    keys[ids >= vocab_size] = LAST_KEY
    return keys


def _block_maxima(logits: Floats) -> Floats:
    """[R, ceil(V / BLOCK)]; torch's inner-axis maximum is ten times faster than numpy's."""
    num_rows, vocab_size = logits.shape
    whole = vocab_size // BLOCK
    head = torch.from_numpy(logits)[:, : whole * BLOCK].reshape(num_rows, whole, BLOCK)
    maxima: Floats = head.amax(dim=-1).numpy()
    if whole * BLOCK == vocab_size:
        return maxima
    tail = logits[:, whole * BLOCK :].max(axis=1, keepdims=True)
    return np.concatenate([maxima, tail], axis=1)


def softmax_weights(logits: Floats, *, highest: Floats, temperatures: Doubles) -> Floats:
    """The softmax's numerators at a temperature: `exp((logit - highest) / temperature)`.

    Args:
        logits: [R, V] float32, no NaN.
        highest: [R], each row's maximum, finite.
        temperatures: [R], greater than 0.

    Returns:
        [R, ceil(V / LANES) * LANES] float32 in [0, 1], a fresh array; padding has weight 0.
    """
    num_rows, vocab_size = logits.shape
    weights = np.zeros((num_rows, -(-vocab_size // LANES) * LANES), np.float32)
    used = weights[:, :vocab_size]
    np.subtract(logits, highest[:, None], out=used)
    if (temperatures != 1.0).any():
        used *= (1.0 / temperatures).astype(np.float32)[:, None]
    np.exp(used, out=used)
    return weights


def column_sums(weights: Floats) -> Doubles:
    """Sums of `LANES` weights each: column j holds tokens j, j + C, j + 2 C ... with C = width / LANES.

    Columns that interleave like this are added as whole vectors, ten times faster than neighbours would be.

    Args:
        weights: [R, width] from `softmax_weights`.

    Returns:
        [R, C] float64.
    """
    lanes = weights.reshape(len(weights), LANES, -1)
    sums: Doubles = lanes.sum(axis=1).astype(np.float64)
    return sums
