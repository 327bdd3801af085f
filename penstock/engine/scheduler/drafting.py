"""How many guesses each decode carries in a step: as many as pay, down to none.

A decode that carries k drafts yields 1 + r + r^2 + ... + r^k tokens on average, r the chance that a guess
stands, and makes the step longer by k times the price of a draft. Here r is estimated for each sequence from
what became of its drafts, the price is the cost model's, and drafts are handed out to whoever gains most
until one more would lower the tokens a second of the whole step. Where steps wait for memory a draft costs
next to nothing; in a large batch it costs a token, and nobody gets any. Prices are estimates: the ledger
(`draft_ledger`) keeps account of what drafts really brought and closes when they lose.

It guesses nothing itself: that is a `Proposer`'s. Called by `scheduler`.

**Source:** Leviathan, Kalman, Matias, "Fast inference from transformers via speculative decoding", 2023, for
the expected number of tokens; Dinkelbach, "On nonlinear fractional programming", 1967, for the greedy rule.
"""

import heapq
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from penstock.core.ids import SequenceId
from penstock.engine.scheduler.cost import CostModel, StepLoad
from penstock.engine.scheduler.draft_ledger import DraftLedger
from penstock.engine.scheduler.plan import UNKNOWN_DRAFT
from penstock.engine.scheduler.request import Sequence

PRIOR_RATE: Final = 0.6
"""Chance that a guess stands before anything is known of a sequence, and its weight in guesses."""
PRIOR_WEIGHT: Final = 2.0
FADING: Final = 0.98
"""Weight of what is known against one step later: a sequence whose guesses failed is tried again in time."""
MARGIN: Final = 1.1
"""A draft must gain so much more than it costs: estimates are noisy and what they cost is certain."""
FIRST_ROWS: Final = 16
"""Drafts of all sequences in a step, at first; then twice the most that were tried."""
STEPS_BETWEEN_CONTRASTS: Final = 64
"""Now and then a step goes without drafts, so that the cost model goes on knowing what that takes."""
MIN_WAIT: Final = 32
MAX_WAIT: Final = 1024
"""Steps between two probes while no draft pays; doubles from one to the other."""
STEPS_BETWEEN_LOOKS: Final = 8
"""While no draft pays for a number of sequences: to find that out anew takes time as well."""
NUM_PROBED: Final = 4
"""Sequences that get one draft each in a probe."""


class Wanted(NamedTuple):
    """One sequence that would take guesses."""

    seq_id: SequenceId
    token_ids: list[int]
    """Prompt and answer so far; only read."""
    num_tokens: int
    """Most guesses, at least 1."""


class Proposer(Protocol):
    """Who guesses what comes next; called once for each step in which drafts may pay."""

    @property
    def num_tokens_max(self) -> int:
        """Most guesses for one sequence in a step."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        ...

    def propose(self, wanted: Listing[Wanted]) -> list[list[int]]:
        """Guesses for each sequence, in order: none to `num_tokens`; bounded time."""
        ...

    def forget(self, seq_id: SequenceId) -> None:
        """The sequence has ended; ids that were never met are ignored."""
        ...


class RunnerGuesses:
    """Stands for a model in the runner: the plan says how many guesses, the runner fills them in."""

    num_bytes: Final = 0
    """The runner counts its own."""

    def __init__(self, *, num_tokens_max: int) -> None:
        self.num_tokens_max = num_tokens_max

    def propose(self, wanted: Listing[Wanted]) -> list[list[int]]:
        """Placeholders."""
        return [[UNKNOWN_DRAFT] * each.num_tokens for each in wanted]

    def forget(self, seq_id: SequenceId) -> None:
        """Nothing is kept."""


@dataclass(slots=True, kw_only=True)
class Acceptance:
    """What became of one sequence's guesses; older ones count less."""

    num_right: float = 0.0
    num_wrong: float = 0.0
    last_step: int = 0

    def rate(self, *, step: int) -> float:
        """Chance that the next guess stands, 0 to 1."""
        weight = FADING ** (step - self.last_step)
        num = weight * (self.num_right + self.num_wrong) + PRIOR_WEIGHT
        return (weight * self.num_right + PRIOR_WEIGHT * PRIOR_RATE) / num

    def learn(self, *, num_right: int, is_cut: bool, step: int) -> None:
        """Note `num_right` guesses that stood, and a wrong one behind them if the run was cut."""
        weight = FADING ** (step - self.last_step)
        self.num_right = weight * self.num_right + num_right
        self.num_wrong = weight * self.num_wrong + is_cut
        self.last_step = step


def choose_lengths(
    rates: Listing[float], *, limits: Listing[int], base: StepLoad, cost: CostModel, num_rows: int
) -> list[int]:
    """Drafts for each sequence so that the step's tokens a second are the most.

    Args:
        rates: chance for each that a guess stands.
        limits: most drafts for each.
        base: the step without drafts; its sequences yield one token each.
        cost: knows what the step and a draft take.
        num_rows: most drafts of all together.

    Returns:
        A length for each, 0 where no draft pays.
    """
    lengths = [0] * len(rates)
    price_s = MARGIN * cost.draft_s
    step_s, num_tokens = cost.predict(base), float(base.num_seqs)
    heap = [(-rate, idx) for idx, rate in enumerate(rates) if limits[idx] > 0]
    heapq.heapify(heap)
    for _ in range(num_rows):
        if not heap:
            break
        gain, idx = -heap[0][0], heap[0][1]
        if gain * step_s < price_s * num_tokens:
            break
        lengths[idx] += 1
        num_tokens += gain
        step_s += price_s
        if lengths[idx] < limits[idx]:
            heapq.heapreplace(heap, (-gain * rates[idx], idx))
        else:
            heapq.heappop(heap)
    return lengths


def num_possible(seq: Sequence, drafts: Listing[int]) -> int:
    """How many drafts its grammar lets pass; none of those that are not known yet."""
    if seq.constraint is None:
        return len(drafts)
    return 0 if UNKNOWN_DRAFT in drafts else seq.constraint.num_valid(drafts)


class Drafting:
    """The drafts of one engine. Not thread-safe: the scheduler owns it."""

    def __init__(self, proposer: Proposer, *, cost: CostModel) -> None:
        """Know no sequence.

        Args:
            proposer: who guesses.
            cost: the scheduler's model, which is told of every step.
        """
        self.ledger = DraftLedger()
        self._proposer = proposer
        self._cost = cost
        self.num_tokens_max = proposer.num_tokens_max
        self._known: dict[SequenceId, Acceptance] = {}
        self._step = 0
        self._num_drafted_steps = 0
        self._num_rows_max = FIRST_ROWS
        self._num_steps_known = 0
        self._wait = MIN_WAIT
        self._next_probe = MIN_WAIT
        self._num_seqs_probed = 0
        self._num_seqs_looked = 0
        self._next_look = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that the proposer holds in this process's policy half."""
        return self._proposer.num_bytes

    def rests(self, num_seqs: int) -> bool:
        """True if a step of so many decodes goes without drafts, so that nobody need be asked.

        Called once for each step with decodes, before `propose`.
        """
        self._step += 1
        if self._step < self._next_look and num_seqs == self._num_seqs_looked:
            return True
        return not self.ledger.allows(num_seqs)

    def propose(
        self, wanted: Listing[Wanted], *, base: StepLoad, num_rows: int
    ) -> dict[SequenceId, list[int]]:
        """Guesses for a step that does not rest.

        Args:
            wanted: decodes that may carry drafts, each with its limit.
            base: the step's decodes without drafts.
            num_rows: most drafts of all together.

        Returns:
            For each sequence that gets any its drafts, at least one.
        """
        if not wanted:  # which says nothing of what pays
            return {}
        lengths = self._lengths(wanted, base=base, num_rows=min(num_rows, self._num_rows_max))
        chosen = [
            Wanted(each.seq_id, each.token_ids, length)
            for each, length in zip(wanted, lengths, strict=True)
            if length
        ]
        if not chosen:
            return {}
        self._num_drafted_steps += 1
        proposals = self._proposer.propose(chosen)
        num_drafts = sum(map(len, proposals))
        if self._cost.num_draft_steps != self._num_steps_known:  # what the last ones cost is known
            self._num_steps_known = self._cost.num_draft_steps
            self._num_rows_max = max(self._num_rows_max, 2 * num_drafts)
        return {each.seq_id: drafts for each, drafts in zip(chosen, proposals, strict=True) if drafts}

    def _lengths(self, wanted: Listing[Wanted], *, base: StepLoad, num_rows: int) -> list[int]:
        rates = [self._rate(each.seq_id) for each in wanted]
        limits = [each.num_tokens for each in wanted]
        lengths = choose_lengths(rates, limits=limits, base=base, cost=self._cost, num_rows=num_rows)
        if any(lengths):
            self._wait = MIN_WAIT
            self._next_probe = self._step + MIN_WAIT
            is_contrast = self._num_drafted_steps % STEPS_BETWEEN_CONTRASTS == STEPS_BETWEEN_CONTRASTS - 1
            self._num_drafted_steps += is_contrast
            return [0] * len(lengths) if is_contrast else lengths
        return self._probe(limits, num_seqs=base.num_seqs, num_rows=num_rows)

    def _rate(self, seq_id: SequenceId) -> float:
        known = self._known.get(seq_id)
        return PRIOR_RATE if known is None else known.rate(step=self._step)

    def _probe(self, limits: list[int], *, num_seqs: int, num_rows: int) -> list[int]:
        """No draft pays by what is known: rarely, or when the load has fallen, one each for a few."""
        lengths = [0] * len(limits)
        is_due = self._step >= self._next_probe or 2 * num_seqs < self._num_seqs_probed
        if not is_due:
            self._num_seqs_looked, self._next_look = num_seqs, self._step + STEPS_BETWEEN_LOOKS
            return lengths
        self._num_seqs_probed = num_seqs
        self._next_probe = self._step + self._wait
        self._wait = min(2 * self._wait, MAX_WAIT)
        for i in range(min(NUM_PROBED, num_rows, len(limits))):
            lengths[(self._step + i) % len(limits)] = 1
        return lengths

    def learn(self, seq_id: SequenceId, *, num_drafts: int, num_right: int) -> None:
        """Note that of `num_drafts` verified guesses the first `num_right` stood."""
        if not num_drafts:
            return
        known = self._known.setdefault(seq_id, Acceptance(last_step=self._step))
        known.learn(num_right=num_right, is_cut=num_right < num_drafts, step=self._step)

    def forget(self, seq_id: SequenceId) -> None:
        """The sequence has ended."""
        self._known.pop(seq_id, None)
        self._proposer.forget(seq_id)
