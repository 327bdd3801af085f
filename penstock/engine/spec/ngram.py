"""Guesses from the text so far: what followed the last tokens where they occurred before.

Pure: token ids in, token ids out, no model. It costs nothing but a look-up and is right wherever an answer
repeats its prompt or itself: records, code, quotations. `scheduler/drafting` calls it.

**Source:** Saxena, "Prompt lookup decoding", 2023; here with an index in place of a search.
"""

from array import array
from collections.abc import Sequence
from typing import Final

from penstock.core.ids import SequenceId
from penstock.engine.scheduler.drafting import Wanted

MAX_WALK: Final = 32
"""Earlier places looked at for the longest match: bounds a look-up in a text of one repeated word."""
MAX_INDEXED_PER_STEP: Final = 2048
"""Tokens that all sequences together index in a step, about a millisecond; the rest follows later."""
MAX_BUCKET_BITS: Final = 16
MIN_BUCKET_BITS: Final = 6


class NgramIndex:
    """Where the n-grams of one growing text ended before.

    A hash chain over the shortest n-grams: `heads[bucket]` is where one ended last, `previous[i]` where one
    of the same bucket ended before i. What a chain leads to is compared, so a bucket may mix n-grams.

    Example, n-grams of 2, text `a b c a b`: the n-gram that ends at 4 leads to 1, and `c` followed there.

    8 bytes a token; adding a token is O(1), a look-up at most `MAX_WALK` comparisons.
    """

    __slots__ = ("_heads", "_mask", "_num_max", "_num_min", "_previous")

    def __init__(self, *, num_min: int, num_max: int, num_tokens: int) -> None:
        """An empty index.

        Args:
            num_min: tokens that must match at least.
            num_max: tokens beyond which a longer match counts no more.
            num_tokens: tokens that are expected, for the number of buckets; there may be more.
        """
        bits = min(MAX_BUCKET_BITS, max(MIN_BUCKET_BITS, num_tokens.bit_length()))
        self._num_min = num_min
        self._num_max = num_max
        self._mask = (1 << bits) - 1
        self._heads = array("i", [-1]) * (1 << bits)
        self._previous = array("i")

    @property
    def num_tokens(self) -> int:
        """Tokens indexed."""
        return len(self._previous)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return 4 * (len(self._heads) + len(self._previous))

    def extend(self, token_ids: Sequence[int], *, end: int) -> None:
        """Index the tokens up to `end`; those before `num_tokens` are as they were."""
        num_min, heads, previous, mask = self._num_min, self._heads, self._previous, self._mask
        for i in range(len(previous), end):
            if i < num_min - 1:
                previous.append(-1)
                continue
            bucket = hash(tuple(token_ids[i - num_min + 1 : i + 1])) & mask
            previous.append(heads[bucket])
            heads[bucket] = i

    def propose(self, token_ids: Sequence[int], *, num_tokens: int) -> list[int]:
        """What followed the last tokens where the longest run of them was before, the latest among equals.

        A text that repeats with a period shorter than `num_tokens` is continued with that period.

        Args:
            token_ids: the text, indexed to its end.
            num_tokens: most guesses.
        """
        last = len(token_ids) - 1
        assert last == len(self._previous) - 1, "the text is indexed to its end"
        place = self._longest_match(token_ids)
        if place < 0:
            return []
        following = list(token_ids[place + 1 : place + 1 + num_tokens])
        period = last - place
        for i in range(len(following), num_tokens):
            following.append(following[i - period])
        return following

    def _longest_match(self, token_ids: Sequence[int]) -> int:
        """Where the best earlier match ended, -1 for none."""
        last = len(token_ids) - 1
        place = self._previous[last] if last >= 0 else -1
        best, best_length = -1, self._num_min - 1
        for _ in range(MAX_WALK):
            if place < 0:
                break
            length = self._common_suffix(token_ids, place)
            if length > best_length:
                best, best_length = place, length
                if length >= self._num_max:
                    break
            place = self._previous[place]
        return best

    def _common_suffix(self, token_ids: Sequence[int], place: int) -> int:
        """How many tokens up to `place` equal those up to the end, at most `num_max`."""
        offset = len(token_ids) - 1 - place
        length = 0
        while length < min(self._num_max, place + 1):
            if token_ids[place - length] != token_ids[place - length + offset]:
                break
            length += 1
        return length


class NgramProposer:
    """Indexes of all sequences that were ever asked about, until they are forgotten."""

    def __init__(self, *, num_min: int, num_max: int, num_tokens_max: int) -> None:
        """Know no sequence.

        Args:
            num_min: tokens that must match at least, 1 or more.
            num_max: tokens beyond which a longer match counts no more.
            num_tokens_max: most guesses for one sequence in a step.
        """
        self.num_tokens_max = num_tokens_max
        self._num_min = num_min
        self._num_max = num_max
        self._indexes: dict[SequenceId, NgramIndex] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all indexes; O(sequences)."""
        return sum(index.num_bytes for index in self._indexes.values())

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """Guesses for each, in order; none where nothing matches or the text is not all indexed yet."""
        num_left = MAX_INDEXED_PER_STEP
        proposals = []
        for seq_id, token_ids, num_tokens in wanted:
            index = self._indexes.get(seq_id)
            if index is None:
                index = self._indexes[seq_id] = NgramIndex(
                    num_min=self._num_min, num_max=self._num_max, num_tokens=len(token_ids)
                )
            num_known = index.num_tokens
            end = min(len(token_ids), num_known + num_left)
            index.extend(token_ids, end=end)
            num_left -= end - num_known
            is_whole = end == len(token_ids)
            proposals.append(index.propose(token_ids, num_tokens=num_tokens) if is_whole else [])
        return proposals

    def forget(self, seq_id: SequenceId) -> None:
        """Drop the index of a sequence; ids that were never met are ignored."""
        self._indexes.pop(seq_id, None)
