"""Beam search: which continuations of which beams live on, which are finished, and when to stop.

Pure bookkeeping over log-probabilities; it knows no blocks and no steps. The scheduler hands it what the
runner told of each beam, and forks and prunes sequences as it says.

```
candidates = the likeliest (1 + end tokens) * width of all continuations of all beams, by summed logprob
those among the first `width` that end the answer   -> finished, scored by sum / length ** length_penalty
the first `width` of the others                     -> the next beams
```

**Source:** the algorithm and its stopping rules are those of `transformers.GenerationMixin._beam_search`; it
follows Wu et al., "Google's neural machine translation system" (2016), section 7, with the length penalty
in the simpler form of a power.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final

from penstock.core.text import FinishReason, TokenLogprob, TokenLogprobs
from penstock.core.tokens import EngineRequest

NEVER: Final = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """A finished answer."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    score: float
    finish_reason: FinishReason
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Beam:
    """An answer that goes on."""

    parent: int
    """Which of the beams before it continues."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    score: float = 0.0
    """Sum of the tokens' log-probabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """One more token after one beam."""

    parent: int
    told: TokenLogprob
    score: float


@dataclass(slots=True, kw_only=True)
class BeamSearch:
    """The search of one request; see the module."""

    request: EngineRequest
    max_tokens: int
    """Of an answer, its end token included."""
    beams: list[Beam] = field(default_factory=lambda: [Beam(parent=0)])
    """As many as `width`, fewer before the first step and where the vocabulary has no more."""
    finished: list[Hypothesis] = field(default_factory=list)
    """At most `width`, best first."""
    _offers: dict[int, TokenLogprobs] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Beams that are kept."""
        return self.request.params.num_sequences

    @property
    def num_candidates(self) -> int:
        """Continuations that must be known of each beam, so that enough go on whichever of them end."""
        return max(2, 1 + len(self._end_ids)) * self.width

    @property
    def _end_ids(self) -> frozenset[int]:
        params = self.request.params
        eos = () if params.ignore_eos else self.request.eos_token_ids
        return frozenset((*eos, *params.stop_token_ids))

    def offer(self, beam: int, told: TokenLogprobs) -> bool:
        """Note what may follow a beam; True once that is known of all of them, and `advance` is due."""
        self._offers[beam] = told
        return len(self._offers) == len(self.beams)

    def forget_offers(self) -> None:
        """The beams are computed again, and will be offered again."""
        self._offers.clear()

    def advance(self) -> list[Beam] | None:
        """Go one token forward.

        Returns:
            The beams that go on, best first; None when the search is over and `finished` holds the answers.
        """
        offers, self._offers = self._offers, {}
        candidates = self._candidates(offers)
        length = len(self.beams[0].token_ids) + 1
        ends = [self._ends(candidate, length=length) for candidate in candidates]
        if not (self._is_full and self.request.params.early_stopping is True):
            best = zip(candidates[: self.width], ends, strict=False)
            ended = [candidate for candidate, is_end in best if is_end]
            self._finish([self._hypothesis(each, offers, length=length) for each in ended])
        going_on = [c for c, is_end in zip(candidates, ends, strict=True) if not is_end][: self.width]
        self.beams = [self._beam(candidate, offers) for candidate in going_on]
        return None if self._is_over(length=length) else self.beams

    def _candidates(self, offers: Mapping[int, TokenLogprobs]) -> list[_Candidate]:
        found = [
            _Candidate(parent=parent, told=told, score=self.beams[parent].score + told.logprob)
            for parent, offer in offers.items()
            for told in offer.top
        ]
        found.sort(key=lambda each: (-each.score, each.parent, each.told.rank))
        return found[: self.num_candidates]

    def _ends(self, candidate: _Candidate, *, length: int) -> bool:
        return length >= self.max_tokens or candidate.told.token_id in self._end_ids

    def _beam(self, candidate: _Candidate, offers: Mapping[int, TokenLogprobs]) -> Beam:
        parent = self.beams[candidate.parent]
        return Beam(
            parent=candidate.parent,
            token_ids=(*parent.token_ids, candidate.told.token_id),
            logprobs=(*parent.logprobs, self._told(candidate, offers)) if self._tells_logprobs else (),
            score=candidate.score,
        )

    @property
    def _tells_logprobs(self) -> bool:
        return self.request.params.logprobs is not None

    def _told(self, candidate: _Candidate, offers: Mapping[int, TokenLogprobs]) -> TokenLogprobs:
        num_top = self.request.params.logprobs or 0
        return TokenLogprobs(candidate.told, offers[candidate.parent].top[:num_top])

    def _finish(self, ended: Sequence[Hypothesis]) -> None:
        """Take finished answers in; the best `width` of all stay."""
        self.finished += ended
        self.finished.sort(key=attrgetter("score"), reverse=True)
        del self.finished[self.width :]

    def _hypothesis(
        self, candidate: _Candidate, offers: Mapping[int, TokenLogprobs], *, length: int
    ) -> Hypothesis:
        parent, token_id = self.beams[candidate.parent], candidate.told.token_id
        score = candidate.score / length**self.request.params.length_penalty
        if token_id in self._end_ids:
            stops = self.request.params.stop_token_ids
            eos = () if self.request.params.ignore_eos else self.request.eos_token_ids
            return Hypothesis(
                token_ids=parent.token_ids,
                logprobs=parent.logprobs,
                score=score,
                finish_reason=FinishReason.STOP,
                stop_token_id=token_id if token_id in stops and token_id not in eos else None,
            )
        whole = self._beam(candidate, offers)
        return Hypothesis(
            token_ids=whole.token_ids,
            logprobs=whole.logprobs,
            score=score,
            finish_reason=FinishReason.LENGTH,
        )

    @property
    def _is_full(self) -> bool:
        return len(self.finished) == self.width

    def _is_over(self, *, length: int) -> bool:
        """True if no beam is left, or none can become better than the worst finished answer."""
        if not self.beams or length >= self.max_tokens:
            return True
        if not self._is_full:
            return False
        params = self.request.params
        if params.early_stopping is True:
            return True
        hopes = params.early_stopping == NEVER and params.length_penalty > 0
        best_length = self.max_tokens if hopes else length
        best_possible: float = self.beams[0].score / best_length**params.length_penalty
        return best_possible <= self.finished[-1].score
