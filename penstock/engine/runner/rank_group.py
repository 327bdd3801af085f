"""The ranks that compute together: the plan is broadcast to all, rank 0 answers.

The seam for tensor parallelism: `engine/core` knows a `RankGroup` and never how many processes it is.
`LocalRank` is the group of one, in this process.
"""

from collections.abc import Collection
from typing import Protocol

from penstock.core.ids import SequenceId
from penstock.engine.runner.runner import Runner
from penstock.engine.runner.step_handle import StepHandle
from penstock.engine.sampling.masks import MaskSource
from penstock.engine.scheduler.cost import TimedStep
from penstock.engine.scheduler.plan import StepPlan, StepResult


class RankGroup(Protocol):
    """What the step loop asks of the half that computes."""

    @property
    def buffer_bytes(self) -> int:
        """Bytes that stay allocated between steps, weights and the scheduler's KV blocks not counted."""
        ...

    def warm_up(
        self, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
    ) -> list[TimedStep]:
        """Run the largest steps once; called once, before the first plan. Says how long each took."""
        ...

    def launch(self, plan: StepPlan) -> StepHandle:
        """Start a step on every rank; does not need the previous step's result to be applied."""
        ...

    def draw(
        self, handle: StepHandle, *, masks: MaskSource | None = None, void: Collection[SequenceId] = ()
    ) -> None:
        """Start the step's draws: after its launch, before the next one; see `Runner.draw`.

        Every rank must know what was drawn, to put it in place of the next plan's `PENDING_TOKEN`s.
        """
        ...

    def collect(self, handle: StepHandle) -> StepResult:
        """Wait for the step and answer; called once per handle, in the order of the launches."""
        ...

    @property
    def can_sleep(self) -> bool:
        """True if `sleep` gives back what every rank holds."""
        ...

    def sleep(self) -> None:
        """Give memory back until `wake_up`; no step is under way, all KV is lost."""
        ...

    def wake_up(self) -> None:
        """Take it again, before the next plan."""
        ...

    def close(self) -> None:
        """Let go of threads and processes; called once, when no further step comes."""
        ...


class LocalRank:
    """One rank, in this process."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    @property
    def buffer_bytes(self) -> int:
        """See `RankGroup`."""
        return self.runner.buffer_bytes

    def warm_up(
        self, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
    ) -> list[TimedStep]:
        """See `RankGroup`."""
        return self.runner.warm_up(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
        )

    def launch(self, plan: StepPlan) -> StepHandle:
        """See `RankGroup`."""
        return self.runner.launch(plan)

    def draw(
        self, handle: StepHandle, *, masks: MaskSource | None = None, void: Collection[SequenceId] = ()
    ) -> None:
        """See `RankGroup`."""
        self.runner.draw(handle, masks=masks, void=void)

    def collect(self, handle: StepHandle) -> StepResult:
        """See `RankGroup`."""
        return self.runner.collect(handle)

    @property
    def can_sleep(self) -> bool:
        """See `RankGroup`."""
        return True

    def sleep(self) -> None:
        """See `RankGroup`."""
        self.runner.sleep()

    def wake_up(self) -> None:
        """See `RankGroup`."""
        self.runner.wake_up()

    def close(self) -> None:
        """See `RankGroup`."""
