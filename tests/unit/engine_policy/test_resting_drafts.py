"""When steps go without drafts unasked."""

from unittest.mock import patch

from penstock.core.ids import SequenceId
from penstock.engine.scheduler.cost import CostModel, StepLoad
from penstock.engine.scheduler.draft_ledger import DraftLedger
from penstock.engine.scheduler.drafting import Drafting, RunnerGuesses, Wanted


def test_a_step_in_which_nobody_can_take_a_guess_does_not_make_the_next_ones_rest():
    """The last token of an answer takes none; the answer after it starts with the next step."""
    drafting = Drafting(RunnerGuesses(num_tokens_max=4), cost=CostModel())
    base = StepLoad(1, 1, 10)
    with patch.object(DraftLedger, "allows", return_value=True):
        for _ in range(20):
            assert not drafting.rests(1)
            assert drafting.propose([], base=base, num_rows=8) == {}
        assert not drafting.rests(1)
        wanted = [Wanted(SequenceId(1), [1, 2, 3], 4)]
        assert drafting.propose(wanted, base=base, num_rows=8)
