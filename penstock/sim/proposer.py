"""Who guesses in a simulation: the real n-gram index, or chance. Called by `simulator`."""

import random
from collections.abc import Sequence

from penstock.core.ids import SequenceId
from penstock.engine.scheduler.drafting import Proposer, RunnerGuesses, Wanted
from penstock.engine.spec.ngram import NgramProposer
from penstock.sim.workload import Setting


class WildProposer:
    """Any tokens, any number of them: with a tiny vocabulary many stand."""

    num_bytes = 0

    def __init__(self, setting: Setting, *, rng: random.Random) -> None:
        self.num_tokens_max = setting.num_drafts_max
        self._vocab_size = setting.vocab_size
        self._rng = rng

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """See `Proposer`."""
        return [
            [self._rng.randrange(self._vocab_size) for _ in range(self._rng.randint(0, each.num_tokens))]
            for each in wanted
        ]

    def forget(self, seq_id: SequenceId) -> None:
        """Nothing is kept."""


def make_proposer(setting: Setting, *, rng: random.Random) -> Proposer | None:
    """What the setting names; None where nobody guesses."""
    if setting.speculation == "none":
        return None
    if setting.speculation == "runner":
        return RunnerGuesses(num_tokens_max=setting.num_drafts_max)
    if setting.speculation == "wild":
        return WildProposer(setting, rng=rng)
    return NgramProposer(num_min=2, num_max=4, num_tokens_max=setting.num_drafts_max)
