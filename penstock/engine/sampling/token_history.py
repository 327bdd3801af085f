"""The tokens of a sequence in order, for the rules that look at repetitions of more than one token.

`sequence_state` keeps one where such a rule is asked for.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Final

import numpy as np

from penstock.core.params import SamplingParams
from penstock.engine.sampling.vocabulary import Ints

FIRST_CAPACITY: Final = 64
MAX_EXPONENT: Final = 64
"""Longer repetitions get no higher penalty: the usual base makes this one 10^15."""


class TokenHistory:
    """A growing array of token ids; appending is amortised O(1)."""

    def __init__(self, token_ids: Iterable[int]) -> None:
        self._ids = np.fromiter(token_ids, np.int64)
        self._length = len(self._ids)

    @property
    def ids(self) -> Ints:
        """[n], oldest first; a view."""
        return self._ids[: self._length]

    def append(self, token_id: int) -> None:
        """One more."""
        if self._length == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros(max(FIRST_CAPACITY, self._length), np.int64)])
        self._ids[self._length] = token_id
        self._length += 1


def banned_continuations(output: Sequence[int] | Ints, *, banned: Iterable[Sequence[int]]) -> list[int]:
    """The tokens that would complete one of the banned sequences.

    Args:
        output: the answer so far.
        banned: token sequences of one or more.
    """
    return [
        int(sequence[-1])
        for sequence in banned
        if len(sequence) == 1 or list(output[-(len(sequence) - 1) :]) == list(sequence[:-1])
    ]


def dry_penalties(history: Ints, *, params: SamplingParams, breakers: Collection[int]) -> dict[int, float]:
    """What "don't repeat yourself" subtracts from which logits.

    A token is penalised if it would prolong a repetition: the last L tokens stood already earlier, and the
    token followed them there. The penalty is `dry_multiplier * dry_base ** (L - dry_allowed_length)`, for the
    longest such L of at least `dry_allowed_length`. Repetitions do not reach across a breaker.

    **Source:** p-e-w, "DRY: a modern repetition penalty" (text-generation-webui pull request 5677, 2024).

    Args:
        history: [n], prompt and answer.
        params: the `dry_` fields.
        breakers: token ids.

    Returns:
        Token id to penalty, 0 or more; the cost is bounded by n and by `MAX_EXPONENT`.
    """
    last_n = params.dry_penalty_last_n
    seen = history if last_n < 0 else history[len(history) - min(last_n, len(history)) :]
    limit = min(_num_since_breaker(seen, breakers), params.dry_allowed_length + MAX_EXPONENT)
    if limit < max(1, params.dry_allowed_length) or len(seen) <= 1:
        return {}
    longest = _longest_repetitions(seen, limit=limit)
    return {
        token_id: params.dry_multiplier * params.dry_base ** (length - params.dry_allowed_length)
        for token_id, length in longest.items()
        if length >= params.dry_allowed_length and token_id not in breakers
    }


def _num_since_breaker(seen: Ints, breakers: Collection[int]) -> int:
    if not breakers:
        return len(seen)
    places = np.flatnonzero(np.isin(seen, np.fromiter(breakers, np.int64, len(breakers))))
    return len(seen) - 1 - int(places[-1]) if len(places) else len(seen)


def _longest_repetitions(seen: Ints, *, limit: int) -> dict[int, int]:
    """For each token that followed an earlier copy of the last tokens: how long a copy, up to `limit`."""
    longest: dict[int, int] = {}
    ends = np.flatnonzero(seen[:-1] == seen[-1])
    length = 1
    while len(ends):
        longest.update(dict.fromkeys(seen[ends + 1].tolist(), length))
        if length >= limit:
            break
        ends = ends[ends >= length]
        ends = ends[seen[ends - length] == seen[len(seen) - 1 - length]]
        length += 1
    return longest
