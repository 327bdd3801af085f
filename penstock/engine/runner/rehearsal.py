"""Steps of our own before the first request: what a first time costs, and what the largest steps take.

`warmup` makes their plans, the runner runs them through here. Nothing of them is left behind.
"""

import time
from typing import Final

from penstock.engine.runner.device_memory import DeviceMemory
from penstock.engine.runner.forward import Forward
from penstock.engine.runner.inference import inference_mode
from penstock.engine.runner.kv_pool import KvPool
from penstock.engine.runner.step_draws import StepDraws
from penstock.engine.runner.step_handle import StepHandle
from penstock.engine.runner.warmup import (
    StepPeaks,
    WarmUpLimits,
    heaviest_steps,
    largest_steps,
    load_of,
    short_chunks,
    touched_blocks,
)
from penstock.engine.sampling.sampler import Sampler
from penstock.engine.scheduler.cost import TimedStep
from penstock.engine.scheduler.plan import StepPlan
from penstock.engine.spec.proposer import RunnerProposer

MAX_WARM_UP_TOKENS: Final = 256
"""A larger chunk would find nothing new, and would delay the start by seconds on a large model."""


class Rehearsal:
    """See the module. Uses the pool's blocks while no sequence has any."""

    def __init__(
        self,
        *,
        pool: KvPool,
        num_groups: int,
        sampler: Sampler,
        drafter: RunnerProposer | None,
        forward: Forward,
        draws: StepDraws,
        compiles: bool,
    ) -> None:
        """Take what a step goes through.

        Args:
            pool: of blocks, for so many cache groups.
            num_groups: cache groups.
            sampler: knows the sequences.
            drafter: guesses tokens; None if nobody does.
            forward: computes.
            draws: draws.
            compiles: kernels are compiled or read from a cache when a step first needs them.
        """
        self._compiles = compiles
        self._pool = pool
        self._num_groups = num_groups
        self._sampler = sampler
        self._drafter = drafter
        self._forward = forward
        self._draws = draws

    def warm_up(
        self, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
    ) -> list[TimedStep]:
        """Run a large chunk and decode batches, clear their blocks and forget their sequences.

        Where kernels are compiled every step is run before it is timed, or the cost model would take the
        compiler's seconds for the step's; so are chunks of a few tokens, which have kernels of their own.

        Args:
            max_num_seqs: decodes in the largest batch.
            max_num_batched_tokens: tokens in the largest chunk; cut to what the pool and the context hold,
                and to `MAX_WARM_UP_TOKENS`.
            max_model_len: tokens in the longest context.

        Returns:
            What was run and how long it took.

        Raises:
            Exception: whatever the model raises; such a model cannot serve.
        """
        max_num_tokens = min(max_num_batched_tokens, max_model_len, MAX_WARM_UP_TOKENS)
        limits = self._limits(max_num_seqs=max_num_seqs, max_num_tokens=max_num_tokens)
        steps = largest_steps(limits)
        if self._compiles:
            for plan in (*steps, *short_chunks(limits)):
                self._run_and_clear(plan)
        return [TimedStep(load_of(plan), self._run_and_clear(plan)) for plan in steps]

    def measure_peaks(
        self, memory: DeviceMemory, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
    ) -> StepPeaks:
        """Run the steps that take the most memory and forget them.

        The pool may have few blocks: their content is lost.

        Args:
            memory: of the device.
            max_num_seqs: sequences in the largest step.
            max_num_batched_tokens: tokens in the largest step.
            max_model_len: tokens in the longest context.

        Raises:
            Exception: whatever the model raises, out of memory included.
        """
        limits = self._limits(max_num_seqs=max_num_seqs, max_num_tokens=max_num_batched_tokens)
        plans = heaviest_steps(
            limits, max_model_len=max_model_len, max_num_batched_tokens=max_num_batched_tokens
        )
        return StepPeaks(*(self._peak(plan, memory) for plan in plans))

    def _limits(self, *, max_num_seqs: int, max_num_tokens: int) -> WarmUpLimits:
        return WarmUpLimits(
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            num_groups=self._num_groups,
            num_blocks=self._pool.num_blocks,
            block_size=self._pool.block_size,
        )

    def _peak(self, plan: StepPlan, memory: DeviceMemory) -> int:
        memory.reset_peak()
        before_bytes = memory.allocated_bytes
        self._run(plan)
        return max(0, memory.peak_bytes - before_bytes)

    def _run_and_clear(self, plan: StepPlan) -> float:
        time_s = self._run(plan)
        self._pool.zero_blocks(touched_blocks(plan))
        return time_s

    def _run(self, plan: StepPlan) -> float:
        """One step; returns how long it took without the drafter."""
        self._sampler.add(plan.new_sequences)
        with inference_mode():
            if self._drafter:
                self._drafter.warm_up(plan.sequences)
            began_s = time.perf_counter()
            handle = StepHandle(plan=plan, passes=[self._forward.run(plan.sequences, may_replay=True)])
            self._draws.start(handle, masks=None, void=())
            self._draws.read(handle)
        time_s = time.perf_counter() - began_s
        self._sampler.forget(plan.finished_seq_ids)
        return time_s
