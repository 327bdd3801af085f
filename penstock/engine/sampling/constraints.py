"""What may not, or should rather, come next: bitmask, `min_tokens`, `logit_bias`.

Each function changes the rows it is given, in place; the sampler gives it copies.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from penstock.engine.sampling.vocabulary import Floats
from penstock.engine.scheduler.constraint import Mask


def apply_bitmask(row: Floats, *, mask: Mask) -> None:
    """Forbid every token whose bit is 0.

    Args:
        row: [vocab], changed in place.
        mask: at least `vocab` bits.
    """
    little_endian = np.ascontiguousarray(mask, dtype="<i4").view(np.uint8)
    allowed = np.unpackbits(little_endian, bitorder="little", count=len(row))
    row[allowed == 0] = -np.inf


def ban_tokens(row: Floats, *, token_ids: Sequence[int]) -> None:
    """Forbid some tokens.

    Args:
        row: [vocab], changed in place.
        token_ids: ids below vocab.
    """
    row[np.array(token_ids, dtype=np.int64)] = -np.inf


def add_bias(row: Floats, *, logit_bias: Mapping[int, float]) -> None:
    """Add to the logits of some tokens; a forbidden one stays forbidden.

    Args:
        row: [vocab], changed in place.
        logit_bias: token id to what is added.
    """
    token_ids = np.fromiter(logit_bias.keys(), np.int64, len(logit_bias))
    row[token_ids] += np.fromiter(logit_bias.values(), np.float32, len(logit_bias))
