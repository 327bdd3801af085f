"""A rank on a thread of its own: the host plans the next step while this one computes.

For ranks whose calls return when the work is done, as on a CPU; a GPU takes work from the host's own thread
and does it beside by itself. One thread does all of the rank's work in the order of the calls, so the runner
knows no concurrency; the kernels release the interpreter while they compute.

```
caller    launch(n+1)    collect(n) waits       draw(n+1)           launch(n+2)
thread    ... draw(n)  | launch(n+1) ............. | draw(n+1) ... | launch(n+2)
```
"""

import threading
import weakref
from collections.abc import Callable, Collection
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

import torch
from msgspec.structs import replace

from penstock.core.ids import SequenceId
from penstock.engine.runner.rank_group import RankGroup
from penstock.engine.runner.step_handle import StepHandle
from penstock.engine.sampling.masks import MaskSource
from penstock.engine.scheduler.cost import TimedStep
from penstock.engine.scheduler.plan import StepPlan, StepResult

T = TypeVar("T")
Job = Callable[[], None]


class OverlappedRank:
    """A `RankGroup` around another one."""

    def __init__(self, rank: RankGroup) -> None:
        """Start the thread.

        Args:
            rank: nobody else calls it from here on.
        """
        self._rank = rank
        self._launched: dict[int, Future[StepHandle]] = {}
        self._results: dict[int, Future[StepResult]] = {}
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(
            target=_work_off, args=(self._jobs,), name="penstock-rank", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, self._jobs.put, None)

    @property
    def buffer_bytes(self) -> int:
        """See `RankGroup`; waits for the step under way."""
        return self._submit(lambda: self._rank.buffer_bytes).result()

    def warm_up(
        self, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
    ) -> list[TimedStep]:
        """See `RankGroup`."""
        warm_up = partial(
            self._rank.warm_up,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
        )
        return self._submit(warm_up).result()

    def launch(self, plan: StepPlan) -> StepHandle:
        """See `RankGroup`."""
        plan = _with_own_tables(plan)
        launched = self._submit(partial(self._rank.launch, plan))
        self._launched[plan.step_id] = launched
        if plan.adapter_bindings:
            launched.result()  # an adapter that is bound could be unloaded before the thread looks it up
        return StepHandle(plan=plan)

    def draw(
        self, handle: StepHandle, *, masks: MaskSource | None = None, void: Collection[SequenceId] = ()
    ) -> None:
        """See `RankGroup`; `masks` are read until the step is collected."""
        step_id = handle.plan.step_id
        launched = self._launched.pop(step_id)
        self._results[step_id] = self._submit(partial(self._finish, launched, masks=masks, void=void))

    def _finish(
        self, launched: Future[StepHandle], *, masks: MaskSource | None, void: Collection[SequenceId]
    ) -> StepResult:
        handle = launched.result()
        self._rank.draw(handle, masks=masks, void=void)
        return self._rank.collect(handle)

    def collect(self, handle: StepHandle) -> StepResult:
        """See `RankGroup`."""
        return self._results.pop(handle.plan.step_id).result()

    @property
    def can_sleep(self) -> bool:
        """See `RankGroup`."""
        return self._rank.can_sleep

    def sleep(self) -> None:
        """See `RankGroup`."""
        self._submit(self._rank.sleep).result()

    def wake_up(self) -> None:
        """See `RankGroup`."""
        self._submit(self._rank.wake_up).result()

    def close(self) -> None:
        """See `RankGroup`."""
        self._submit(self._rank.close).result()
        self._jobs.put(None)
        self._thread.join()

    def _submit(self, work: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()
        self._jobs.put(partial(_run, future, work))
        return future


def _with_own_tables(plan: StepPlan) -> StepPlan:
    """The plan with copies of the block tables, which the scheduler goes on changing."""
    sequences = [
        replace(seq, block_tables=tuple(list(table) for table in seq.block_tables)) for seq in plan.sequences
    ]
    return replace(plan, sequences=sequences)


def _work_off(jobs: "SimpleQueue[Job | None]") -> None:
    with torch.inference_mode():
        while (job := jobs.get()) is not None:
            job()
            del job  # it may hold the last reference to who would end this thread


def _run(future: "Future[T]", work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - the edge of a thread: who waits gets it
        future.set_exception(error)
