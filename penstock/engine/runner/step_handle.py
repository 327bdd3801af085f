"""A step under way, from `launch` to `collect`. The runner writes it, `engine/core` carries it along."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from penstock.engine.runner.device_draws import StartedDraws
from penstock.engine.runner.forward_pass import ForwardPass
from penstock.engine.sampling.sampler import Outcome
from penstock.engine.scheduler.plan import SequenceFailure, StepPlan
from penstock.engine.spec.proposer import Guesses

NO_GUESSES: Final = Guesses(sequences=(), proposals=[], num_caught_up_tokens=0)


@dataclass(slots=True, kw_only=True)
class StepHandle:
    """See the module."""

    plan: StepPlan
    passes: Sequence[ForwardPass] = ()
    """One, unless some sequence raised; in plan order."""
    failures: Sequence[SequenceFailure] = ()
    """Of the model."""
    guesses: Guesses = NO_GUESSES
    outcomes: Sequence[Outcome] | None = None
    """Of the draws, failures of the model among them; None before `draw`, on a device before `collect`."""
    started: StartedDraws | None = None
    """Draws under way on a device."""
    launch_time_s: float = 0.0
    draw_time_s: float = 0.0
    ended_s: float = 0.0
    """When the last of it was done, by `time.perf_counter`."""
