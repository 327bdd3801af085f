"""Which guesses stand: each is compared with what the sampler draws at its place.

Behind a run of k drafts the model has k + 1 rows of logits. The token for the first row is drawn exactly as
it would be without speculation, with the sequence's own parameters, history and random number; if it equals
the first draft, the second row is what the model says after it, and its token is drawn next; and so on to the
first draft that differs. So the answer is, token for token, the one without speculation: the distribution
is the model's because every token is drawn from the model.

For a guess that is one token and no distribution this is also what rejection sampling comes to: accept x
with the model's probability p(x), else draw from p without x. Guesses of a model are drawn with the random
number that will verify them, so that both agree wherever their distributions do.

The runner calls it. It knows no logits and no sampler.

**Source:** Leviathan, Kalman, Matias, "Fast inference from transformers via speculative decoding", 2023.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

from penstock.engine.sampling.sampler import Outcome
from penstock.engine.scheduler.plan import SampledToken, SampleSpec


class Draw(NamedTuple):
    """One token to draw: `spec` from row `row` of a pass's logits."""

    spec: SampleSpec
    row: int
    depth: int = 0
    """Drafts before it."""


class DraftRun(NamedTuple):
    """The draws of one sequence: one before its drafts and one behind each."""

    first: Draw
    drafts: Sequence[int] = ()
    is_free_of_history: bool = True
    """True if no token drawn in this step changes how a later one is drawn: all can be drawn at once."""

    def wave(self, depth: int) -> list[Draw]:
        """What to draw once the first `depth` drafts stand."""
        depths = range(len(self.drafts) + 1) if self.is_free_of_history else (depth,)
        return [self._draw(each) for each in depths]

    def _draw(self, depth: int) -> Draw:
        if not depth:
            return self.first
        spec = SampleSpec(self.first.spec.seq_id, self.first.spec.output_idx + depth)
        return Draw(spec=spec, row=self.first.row + depth, depth=depth)

    def confirms(self, outcome: Outcome, *, depth: int) -> bool:
        """True if what was drawn behind the first `depth` drafts is the next draft."""
        if depth >= len(self.drafts) or not isinstance(outcome, SampledToken):
            return False
        return outcome.token_id == self.drafts[depth]

    def standing(self, drawn: Sequence[Outcome], *, depth: int) -> Sequence[Outcome]:
        """Of the outcomes of one wave those up to the first that is not the draft beside it."""
        for idx, outcome in enumerate(drawn):
            if not self.confirms(outcome, depth=depth + idx):
                return drawn[: idx + 1]
        return drawn


def verify(
    runs: Sequence[DraftRun],
    *,
    draw: Callable[[Sequence[Draw]], Sequence[Outcome]],
    commit: Callable[[Sequence[SampledToken]], None],
) -> list[Outcome]:
    """Draw in waves: one token for all, then for those whose draft it was the one behind it, and so on.

    Args:
        runs: sequences to draw for.
        draw: the outcome of each draw, in order; changes nothing.
        commit: told of tokens that are now part of their answers, before the next wave.

    Returns:
        For each run, in order, its tokens and its failure if it ends in one.
    """
    if not any(run.drafts for run in runs):  # the usual step: one wave, and every draw stands
        all_stand = list(draw([run.first for run in runs]))
        commit([each for each in all_stand if isinstance(each, SampledToken)])
        return all_stand
    taken: list[list[Outcome]] = [[] for _ in runs]
    pending = list(range(len(runs)))
    depth = 0
    while pending:
        waves = [runs[idx].wave(depth) for idx in pending]
        drawn = iter(draw(list(chain.from_iterable(waves))))
        stands = [
            runs[idx].standing([next(drawn) for _ in wave], depth=depth)
            for idx, wave in zip(pending, waves, strict=True)
        ]
        for idx, outcomes in zip(pending, stands, strict=True):
            taken[idx] += outcomes
        commit([each for each in chain.from_iterable(stands) if isinstance(each, SampledToken)])
        pending = [
            idx
            for idx, outcomes in zip(pending, stands, strict=True)
            if not runs[idx].is_free_of_history and runs[idx].confirms(outcomes[-1], depth=depth)
        ]
        depth += 1
    return list(chain.from_iterable(taken))
