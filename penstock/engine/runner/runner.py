"""One rank's execution of a plan: inputs, model, logits, tokens.

`launch` computes, `draw` samples, `collect` answers; nothing else crosses. The runner decides nothing and
keeps nothing of a sequence but what sampling needs and the token that it drew last. `rank_group` calls it.

With one step of asynchrony the calls of two steps alternate, and each step's own are still in order:

```
launch(n)  draw(n)  launch(n+1)  collect(n)  [the scheduler applies n]  draw(n+1)  launch(n+2)  collect(n+1)
```

So `draw(n)` comes before `launch(n+1)`: the tokens that step n + 1 computes in place of `PENDING_TOKEN` are
those that `draw(n)` chose.

A fault stays with the sequence that causes it. An exception in the model or in the sampler is traced by
repeating the work on halves of the batch. Repeating is safe: a pass reads the plan and the KV of earlier
tokens and writes the KV of the plan's own tokens to the same slots with the same values, whoever else is in
the pass; blocks are zeroed and copied once, before the first pass; sampling changes nothing until `commit`.

Want of memory is no fault: it is counted, caches are emptied, and the halves are tried. What cannot be had
even for one sequence alone is told as `OUT_OF_MEMORY`, and the scheduler plans it again in a smaller step.
"""

import logging
import time
import traceback
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Final

import torch
from msgspec.structs import replace

from penstock.core.errors import EngineDeadError
from penstock.core.ids import SequenceId
from penstock.engine.bisection import Culprit, isolate
from penstock.engine.kv.cache_groups import CacheLayout
from penstock.engine.runner.copy_stream import CudaCopyStream
from penstock.engine.runner.cuda_graphs import DecodeGraphs, PassOutput
from penstock.engine.runner.decode_steps import DecodedStep, decode_steps
from penstock.engine.runner.device_batch import LastDrawn, on_device
from penstock.engine.runner.device_draws import DeviceDraws, QueuedPass, ReadPass, StartedDraws
from penstock.engine.runner.device_memory import DeviceMemory, memory_of
from penstock.engine.runner.faults import FaultPoints
from penstock.engine.runner.host_blocks import HostBlocks
from penstock.engine.runner.input_batch import InputBatchBuilder
from penstock.engine.runner.kv_pool import KvPool
from penstock.engine.runner.out_of_memory import is_out_of_memory
from penstock.engine.runner.pooling import PoolPart, Pools, overflowing, pool
from penstock.engine.runner.prompt_scores import prompt_logprobs
from penstock.engine.runner.stored_weights import StoredWeights
from penstock.engine.runner.warmup import (
    StepPeaks,
    WarmUpLimits,
    heaviest_steps,
    largest_steps,
    load_of,
    touched_blocks,
)
from penstock.engine.sampling.fast import DeviceSampler
from penstock.engine.sampling.greedy import GreedySampler
from penstock.engine.sampling.masks import MaskSource
from penstock.engine.sampling.native import NativeSampler
from penstock.engine.sampling.sampler import Outcome, Sampler
from penstock.engine.sampling.vocabulary import Floats
from penstock.engine.scheduler.cost import TimedStep
from penstock.engine.scheduler.plan import (
    NO_TRAFFIC,
    OUT_OF_MEMORY,
    PENDING_TOKEN,
    AdapterBinding,
    HostTraffic,
    PromptLogprobs,
    SampledToken,
    SampleSpec,
    ScheduledSequence,
    SequenceFailure,
    StepPlan,
    StepResult,
)
from penstock.engine.spec.proposer import Guesses, RunnerProposer
from penstock.engine.spec.verify import DraftRun, Draw, verify
from penstock.kernels.adapters import AdapterWeights
from penstock.kernels.ops import KernelSet, kv_block, not_finite, rows_not_finite
from penstock.kernels.transfer import indices, on_host
from penstock.models.interface import CausalLM, LoadedModel

CANARY: Final = SequenceId(-1)
"""Our own one-token sequence on the scratch block: if it fails too, the fault is no request's."""

MAX_WARM_UP_TOKENS: Final = 256
"""A larger chunk would find nothing new, and would delay the start by seconds on a large model."""

STEADY: Final = nullcontext()
ANY_TOKEN: Final = 0
"""Of a sequence whose outcome is discarded."""
NO_GUESSES: Final = Guesses(sequences=(), proposals=[], num_caught_up_tokens=0)
NO_LOGITS: Final = torch.empty(0, 0)
"""Of a pass that samples nothing."""

log = logging.getLogger("penstock.engine.runner")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """What one pass of the model left for the sampler."""

    sequences: Sequence[ScheduledSequence]
    ends: Sequence[int]
    """For each sequence one past its last row."""
    is_sound: Sequence[bool] | None
    """[len(sequences)]: False if a hidden state of the sequence is NaN or infinite; None where
    `bad_rows` alone tells, on a device that nobody has waited for."""
    bad_rows: torch.Tensor | None = None
    """[rows] bool on the device, True where a row is not finite; None without a queue."""
    logits: torch.Tensor
    """[sequences with samples and their drafts, vocab] float32"""
    prompt_logprobs: Sequence[PromptLogprobs] = ()
    """Of sound sequences."""
    pools: Sequence[PoolPart] = ()
    """Of sound sequences."""
    drawn: Sequence[SampleSpec] | None = None
    """Whose tokens were drawn with the pass, without masks; None if nothing was."""


@dataclass(slots=True, kw_only=True)
class StepHandle:
    """A step under way, from `launch` to `collect`."""

    plan: StepPlan
    passes: Sequence[ForwardPass] = ()
    """One, unless some sequence raised; in plan order."""
    failures: Sequence[SequenceFailure] = ()
    guesses: Guesses = NO_GUESSES
    outcomes: Sequence[Outcome] | None = None
    """Of the draws, failures of the model among them; None before `draw`, on a device before `collect`."""
    started: StartedDraws | None = None
    """Draws under way on a device."""
    launch_time_s: float = 0.0
    draw_time_s: float = 0.0
    ended_s: float = 0.0


class Runner:
    """Runs plans for one loaded model on one KV pool."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        layout: CacheLayout,
        num_blocks: int,
        block_size: int,
        num_host_blocks: int = 0,
        faults: FaultPoints | None = None,
        num_adapter_slots: int = 0,
        adapter_weights: Callable[[str], AdapterWeights] | None = None,
        make_drafter: Callable[[Sampler], RunnerProposer] | None = None,
        make_graphs: Callable[[KvPool], DecodeGraphs] | None = None,
        is_alone: bool = True,
    ) -> None:
        """Reserve the KV memory.

        Args:
            loaded: the model and its dtype.
            layout: how its layers share blocks.
            num_blocks: blocks that the scheduler may hand out.
            block_size: token slots in a block.
            num_host_blocks: blocks of the offload tier in host memory, 0 for none.
            faults: where tests make it fail; None in production.
            num_adapter_slots: different adapters in one step, 0 without adapters.
            adapter_weights: of a version that is bound to a slot.
            make_drafter: makes who guesses tokens here, given the sampler; None if nobody does.
            make_graphs: makes the recordings of decode steps; None runs every step launch by launch.
            is_alone: False if other ranks compute every pass too: it is then never repeated, since they would
                not repeat it, and what raises in it is the end of the engine.
        """
        self._model = loaded.model
        self._layout = layout
        self._faults = faults
        self._adapters: list[AdapterWeights | None] = [None] * num_adapter_slots
        self._adapter_weights = adapter_weights
        shape = loaded.kv_shape(block_size=block_size)
        self._pool = KvPool(
            layout,
            num_blocks=num_blocks,
            shape=shape,
            block=kv_block(loaded.kernels, shape),
            device=loaded.device,
        )
        self._device = loaded.device
        self._host_blocks = _host_blocks(self._pool, num_slots=num_host_blocks)
        self._is_alone = is_alone
        self._model_bytes = loaded.buffer_bytes
        self._inputs = InputBatchBuilder(layout, pool=self._pool)
        self._kernels = loaded.kernels
        self._sampler = Sampler(native=_native_sampler(loaded.kernels))
        self._pools = Pools()
        self._drafter = None if make_drafter is None else make_drafter(self._sampler)
        self._memory = memory_of(loaded.device)
        self._num_out_of_memory = 0
        self._last_drawn: dict[SequenceId, int] = {}
        """What the latest draws chose, where the host knows it."""
        self._last_on_device = LastDrawn()
        """Where it lies, where they are under way on a device."""
        self._queue = self._make_queue() if loaded.is_queued else None
        self._make_graphs = make_graphs
        self._graphs = None if make_graphs is None else make_graphs(self._pool)
        self._weights = StoredWeights(loaded.model)
        self._decodes = decode_steps(loaded, inputs=self._inputs, sampler=self._sampler)

    def _make_queue(self) -> DeviceDraws:
        return DeviceDraws(
            self._sampler,
            device_sampler=_device_sampler(self._kernels),
            device=self._device,
            before_sample=self._faults.before_sample if self._faults else None,
            on_error=self._shed_if_short,
        )

    @property
    def model(self) -> CausalLM:
        """What it runs, for profiles."""
        return self._model

    @property
    def buffer_bytes(self) -> int:
        """Bytes kept beside KV and weights: activations, scratch block, tables, sampling states, sums."""
        own = self._pool.bytes_per_block + self._inputs.buffer_bytes + self._sampler.num_bytes
        own += self._pools.num_bytes + (self._queue.num_bytes if self._queue else 0)
        own += self._graphs.num_bytes if self._graphs else 0
        drafter = self._drafter.buffer_bytes if self._drafter else 0
        return own + self._model_bytes() + drafter

    def launch(self, plan: StepPlan) -> StepHandle:
        """Prepare blocks and run the model; needs no result of an earlier step to be applied.

        Args:
            plan: what to compute. Its block tables are read during this call only.

        Returns:
            The handle for `draw` and `collect`.

        Raises:
            EngineDeadError: the model fails for every sequence, and so does the canary.
        """
        with _inference():
            return self._launch(plan)

    def _launch(self, plan: StepPlan) -> StepHandle:
        began_s = time.perf_counter()
        self._sampler.add(plan.new_sequences)
        self._sampler.commit_forced(plan.forced_tokens)
        self._bind_adapters(plan.adapter_bindings)
        self._pool.zero_blocks(plan.blocks_to_zero)
        self._pool.copy_blocks(plan.block_copies)
        if self._host_blocks is not None:
            self._host_blocks.begin(plan.host_moves)
        handle = StepHandle(plan=plan)
        try:
            handle.guesses = self._guess(plan, self._put_in_place(plan.sequences))
            if handle.guesses.sequences:
                handle.passes, handle.failures = self._compute(handle.guesses.sequences)
        except Exception as error:  # noqa: BLE001 - all but one kind are raised again
            self._shed(error)
            handle.passes, handle.failures = [], _all_short_of_memory(plan)
        handle.launch_time_s = time.perf_counter() - began_s
        return handle

    def _put_in_place(self, sequences: Sequence[ScheduledSequence]) -> Sequence[ScheduledSequence]:
        """The same with the tokens that the step before drew where the plan could not know them.

        A sequence for which that step drew nothing has failed: whatever is computed for it is discarded.
        Tokens that lie on a device are put in place there.
        """
        if not any(seq.token_ids[0] == PENDING_TOKEN for seq in sequences):
            return sequences
        return [
            replace(seq, token_ids=[self._last_drawn.get(seq.seq_id, ANY_TOKEN)])
            if seq.token_ids[0] == PENDING_TOKEN and seq.seq_id not in self._last_on_device.rows
            else seq
            for seq in sequences
        ]

    def _bind_adapters(self, bindings: Sequence[AdapterBinding]) -> None:
        for binding in bindings:
            assert self._adapter_weights is not None, "a plan binds adapters only where they are enabled"
            weights = self._adapter_weights(binding.revision) if binding.revision else None
            self._adapters[binding.slot] = weights

    def _guess(self, plan: StepPlan, sequences: Sequence[ScheduledSequence]) -> Guesses:
        """The plan's sequences, with tokens where it leaves guesses to the runner."""
        if self._drafter is None:
            return Guesses(sequences=sequences, proposals=[], num_caught_up_tokens=0)
        self._drafter.add(plan.new_sequences)
        self._drafter.move_blocks(copies=plan.block_copies, zeroed=plan.blocks_to_zero)
        return self._drafter.fill(sequences)

    def draw(
        self,
        handle: StepHandle,
        *,
        masks: MaskSource | None = None,
        void: Collection[SequenceId] = (),
    ) -> None:
        """Sample; called once per handle, in the order of the launches and before the next launch.

        Args:
            handle: from `launch`; takes the outcomes.
            masks: what the sequences may draw; None allows all of them everything.
            void: sequences for which nothing is drawn though the plan says so: the step before, applied since
                the launch, has ended them or brought their next token by other means.
        """
        with _inference():
            began_s = time.perf_counter()
            # Not before: the step before it, drawn later than this step was planned, may still know them.
            self._forget(handle.plan.finished_seq_ids)
            try:
                self._start_draws(handle, masks=masks, void=void)
            except Exception as error:  # noqa: BLE001 - all but one kind are raised again
                self._shed(error)
                self._draw_nothing(handle)
            handle.ended_s = time.perf_counter()
            handle.draw_time_s = handle.ended_s - began_s

    def _start_draws(
        self, handle: StepHandle, *, masks: MaskSource | None, void: Collection[SequenceId]
    ) -> None:
        """Draw, on a device only as far as it can be queued."""
        queued = [_queued(done, void=void) for done in handle.passes]
        if self._queue and not any(seq.num_drafts for done in handle.passes for seq in done.sequences):
            handle.started = self._queue.start([each for each in queued if each], masks=masks)
            self._last_drawn, self._last_on_device = {}, handle.started.last
            return
        outcomes: list[Outcome] = list(handle.failures)
        for done in handle.passes:
            outcomes.extend(self._sample(done, masks=masks, void=void))
        handle.outcomes = outcomes
        self._last_on_device = LastDrawn()
        self._last_drawn = {
            drawn.seq_id: drawn.token_id for drawn in outcomes if isinstance(drawn, SampledToken)
        }

    def _draw_nothing(self, handle: StepHandle) -> None:
        """There was no memory for the draws: all that were computed are computed once more."""
        owners = [seq_id for done in handle.passes for seq in done.sequences for seq_id in _owners(seq)]
        handle.outcomes = [*handle.failures, *map(_short_of_memory, owners)]
        handle.passes, handle.started = [], None
        self._last_drawn, self._last_on_device = {}, LastDrawn()

    def _shed_if_short(self, error: Exception) -> None:
        if is_out_of_memory(error):
            self._shed(error)

    def _shed(self, error: Exception) -> None:
        """Memory could not be had: count it and give back what nothing uses; any other error is raised.

        With other ranks it is raised too: they compute on, and would wait for this one for ever.
        The frames in which it was raised are cleared first: they hold what the failed attempt had made.
        """
        if not is_out_of_memory(error) or not self._is_alone:
            raise error
        self._num_out_of_memory += 1
        log.warning("a step ran out of memory: %s", error)
        traceback.clear_frames(error.__traceback__)
        if self._memory is not None:
            self._memory.empty_cache()

    def _read_draws(self, handle: StepHandle) -> Sequence[Outcome]:
        """What was drawn; waits for a device, whose tokens are counted here."""
        if handle.outcomes is not None or self._queue is None or handle.started is None:
            return handle.outcomes or ()
        outcomes: list[Outcome] = list(handle.failures)
        for done, read in zip(handle.passes, self._queue.read(handle.started), strict=True):
            outcomes.extend(_outcomes_in_order(done, read))
        handle.ended_s = time.perf_counter()
        self._sampler.commit(each for each in outcomes if isinstance(each, SampledToken))
        handle.outcomes = outcomes
        return outcomes

    def _forget(self, seq_ids: Sequence[SequenceId]) -> None:
        self._sampler.forget(seq_ids)
        self._pools.forget(seq_ids)
        if self._drafter:
            self._drafter.forget(seq_ids)

    def collect(self, handle: StepHandle, *, masks: MaskSource | None = None) -> StepResult:
        """Answer; called once per handle, in the order of the launches.

        Args:
            handle: from `launch`; drawn here and now if `draw` was not called for it.
            masks: for `draw` then.

        Returns:
            A token or a failure for every `SampleSpec` of the plan that was not void, and a failure for every
            sequence without samples that could not be computed. Tokens are in plan order.
        """
        if handle.outcomes is None and handle.started is None:
            self.draw(handle, masks=masks)
        began_s = time.perf_counter()
        with _inference():
            outcomes = self._read_draws(handle)
        tokens = [outcome for outcome in outcomes if isinstance(outcome, SampledToken)]
        return StepResult(
            step_id=handle.plan.step_id,
            tokens=tokens,
            failures=[outcome for outcome in outcomes if isinstance(outcome, SequenceFailure)],
            prompt_logprobs=[part for done in handle.passes for part in done.prompt_logprobs],
            pooled=[
                pooled
                for done in handle.passes
                for part in done.pools
                if (pooled := self._pools.take(part)) is not None
            ],
            proposals=handle.guesses.proposals,
            num_caught_up_tokens=handle.guesses.num_caught_up_tokens,
            host_traffic=self._host_traffic(handle),
            num_out_of_memory=self._take_num_out_of_memory(),
            step_time_s=handle.launch_time_s + handle.draw_time_s + time.perf_counter() - began_s,
            ended_s=handle.ended_s,
        )

    def _take_num_out_of_memory(self) -> int:
        count, self._num_out_of_memory = self._num_out_of_memory, 0
        return count

    def _host_traffic(self, handle: StepHandle) -> HostTraffic:
        if self._host_blocks is None:
            return NO_TRAFFIC
        return self._host_blocks.take_done(wait=not handle.guesses.sequences)

    def warm_up(
        self, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
    ) -> list[TimedStep]:
        """Run a large chunk and decode batches, so that no request meets a first time.

        Uses the pool's blocks while no sequence has any, clears them and forgets the sequences.

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
        limits = WarmUpLimits(
            max_num_seqs=max_num_seqs,
            max_num_tokens=min(max_num_batched_tokens, max_model_len, MAX_WARM_UP_TOKENS),
            num_groups=len(self._layout.groups),
            num_blocks=self._pool.num_blocks,
            block_size=self._pool.block_size,
        )
        timed = []
        for plan in largest_steps(limits):
            timed.append(TimedStep(load_of(plan), self._run_once(plan)))
            self._pool.zero_blocks(touched_blocks(plan))
        if self._graphs:
            with _inference():
                self._graphs.record_at_start(self._inputs.build([self._canary()]))
        return timed

    def _run_once(self, plan: StepPlan) -> float:
        """A step of our own; returns how long it took without the drafter."""
        self._sampler.add(plan.new_sequences)
        with _inference():
            if self._drafter:
                self._drafter.warm_up(plan.sequences)
            began_s = time.perf_counter()
            handle = StepHandle(plan=plan, passes=[self._forward(plan.sequences, may_replay=True)])
            self._start_draws(handle, masks=None, void=())
            self._read_draws(handle)
        time_s = time.perf_counter() - began_s
        self._sampler.forget(plan.finished_seq_ids)
        return time_s

    def measure_peaks(
        self, memory: DeviceMemory, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
    ) -> StepPeaks:
        """Run the steps that take the most memory, once, and forget them.

        The pool may have few blocks: their content is lost.

        Args:
            memory: of the device.
            max_num_seqs: sequences in the largest step.
            max_num_batched_tokens: tokens in the largest step.
            max_model_len: tokens in the longest context.

        Raises:
            Exception: whatever the model raises, out of memory included.
        """
        limits = WarmUpLimits(
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_batched_tokens,
            num_groups=len(self._layout.groups),
            num_blocks=self._pool.num_blocks,
            block_size=self._pool.block_size,
        )
        peaks = []
        for plan in heaviest_steps(
            limits, max_model_len=max_model_len, max_num_batched_tokens=max_num_batched_tokens
        ):
            memory.reset_peak()
            before_bytes = memory.allocated_bytes
            self._run_once(plan)
            peaks.append(max(0, memory.peak_bytes - before_bytes))
        return StepPeaks(*peaks)

    def _compute(
        self, sequences: Sequence[ScheduledSequence]
    ) -> tuple[Sequence[ForwardPass], list[SequenceFailure]]:
        if not self._is_alone:
            return [self._forward_once(sequences)], []

        def attempt(part: Sequence[ScheduledSequence]) -> ForwardPass:
            return self._forward(part, may_replay=part is sequences)

        done = isolate(sequences, attempt=attempt, on_error=self._shed_if_short)
        self._refuse_engine_fault(done.culprits, num_sequences=len(sequences))
        failures = [
            _failure(seq_id, error=culprit.error, place="model")
            for culprit in done.culprits
            for seq_id in _owners(culprit.member)
        ]
        return done.parts, failures

    def _forward_once(self, sequences: Sequence[ScheduledSequence]) -> ForwardPass:
        try:
            return self._forward(sequences)
        except Exception as error:
            raise EngineDeadError(
                f"a pass over several ranks failed and cannot be repeated: {type(error).__name__}"
            ) from error

    def _forward(self, sequences: Sequence[ScheduledSequence], *, may_replay: bool = False) -> ForwardPass:
        """One pass of the model; repeatable (see the module).

        Args:
            sequences: what to compute.
            may_replay: it is the only pass of its step: outputs of a recording, or of a step of decodes as
                one call, last until the next.
        """
        if self._faults:
            self._faults.before_forward([seq.seq_id for seq in sequences if seq.seq_id != CANARY])
        elif self._decodes and may_replay:
            decoded = self._decodes.run(sequences, adapters=self._adapters)
            if decoded is not None:
                return _decoded_pass(sequences, decoded)
        batch = self._inputs.build(sequences, adapters=self._adapters)
        if self._graphs and may_replay:
            output = self._graphs.replay(batch, sequences=sequences, last=self._last_on_device)
            if output is not None:
                return self._replayed(sequences, output)
        if self._queue:
            batch = on_device(batch, device=self._device, sequences=sequences, last=self._last_on_device)
        hidden = self._model.forward(batch)
        ends = list(accumulate(batch.groups[0].query_lens_host))
        rows = [
            row
            for end, seq in zip(ends, sequences, strict=True)
            if seq.samples
            for row in range(end - 1 - seq.num_drafts, end)
        ]
        logits = NO_LOGITS
        if rows:  # without a copy where they are all, as in a step of decodes
            is_all = len(rows) == ends[-1]
            taken = hidden if is_all else hidden.index_select(0, indices(rows, device=self._device))
            logits = self._model.logits(taken)
        if self._faults:
            owners = [seq.seq_id for seq in sequences if seq.samples for _ in range(1 + seq.num_drafts)]
            self._faults.after_logits(logits, owners)
        return self._look_at(sequences, hidden=hidden, ends=ends, logits=logits)

    def _replayed(self, sequences: Sequence[ScheduledSequence], output: PassOutput) -> ForwardPass:
        """The pass of a recorded step of decodes, whose head has scored every row."""
        rows = [row for row, seq in enumerate(sequences) if seq.samples]
        is_all = len(rows) == len(sequences)
        logits = output.logits if is_all else output.logits[indices(rows, device=self._device)]
        if self._faults:
            self._faults.after_logits(logits, [sequences[row].seq_id for row in rows])
        ends = list(range(1, len(sequences) + 1))
        return self._look_at(
            sequences, hidden=output.hidden, ends=ends, logits=logits, bad_rows=output.bad_rows
        )

    def sleep(self) -> None:
        """Give memory back until `wake_up`: KV is lost, weights on a device go to host memory.

        No step may be under way. The offload tier stays: it is host memory.
        """
        self._graphs = None  # they hold addresses
        self._last_on_device = LastDrawn()
        self._pool.release()
        self._weights.put_aside()
        if self._drafter:
            self._drafter.release()
        if self._memory is not None:
            self._memory.empty_cache()

    def wake_up(self) -> None:
        """Take it again; decode steps are recorded anew as the engine finds time."""
        self._weights.bring_back()
        self._pool.restore()
        if self._drafter:
            self._drafter.restore()
        self._graphs = None if self._make_graphs is None else self._make_graphs(self._pool)

    def record_next(self) -> bool:
        """Record one more kind of decode step, while there is nothing else to do; False if none is left."""
        if self._graphs is None:
            return False
        with _inference():
            return self._graphs.record_next(self._inputs.build([self._canary()]))

    def _canary(self) -> ScheduledSequence:
        table = [self._pool.scratch_block]
        return ScheduledSequence(CANARY, [0], 0, (table,) * len(self._layout.groups))

    def _look_at(
        self,
        sequences: Sequence[ScheduledSequence],
        *,
        hidden: torch.Tensor,
        ends: Sequence[int],
        logits: torch.Tensor,
        bad_rows: torch.Tensor | None = None,
    ) -> ForwardPass:
        """Who is sound, and what was asked of the prompts; on a device only where the host needs it now."""
        if self._queue and bad_rows is None:
            bad_rows = not_finite(self._kernels, hidden)
        if bad_rows is not None and not any(_needs_host(seq) for seq in sequences):
            return ForwardPass(
                sequences=sequences, ends=ends, is_sound=None, bad_rows=bad_rows, logits=logits
            )
        is_sound = _are_sound(rows_not_finite(self._kernels, hidden), ends)
        asking = [
            (seq, end)
            for seq, end, ok in zip(sequences, ends, is_sound, strict=True)
            if (seq.prompt_targets or seq.pooling is not None) and ok
        ]
        if not asking:
            return ForwardPass(
                sequences=sequences, ends=ends, is_sound=is_sound, bad_rows=bad_rows, logits=logits
            )
        pools = pool(asking, hidden=hidden, logits=self._model.logits)
        bad = overflowing(pools)
        return ForwardPass(
            sequences=sequences,
            ends=ends,
            is_sound=[ok and seq.seq_id not in bad for ok, seq in zip(is_sound, sequences, strict=True)],
            bad_rows=bad_rows,
            logits=logits,
            prompt_logprobs=prompt_logprobs(
                [(seq, end) for seq, end in asking if seq.seq_id not in bad],
                hidden=hidden,
                logits=self._model.logits,
                vocab=self._model.vocab_size,
            ),
            pools=[part for part in pools if part.seq_id not in bad],
        )

    def _refuse_engine_fault(
        self, culprits: Sequence[Culprit[ScheduledSequence]], *, num_sequences: int
    ) -> None:
        """Let single culprits pass; raise if nothing works any more.

        Who lacked memory is planned again. Of the others the canary alone decides. Steps without a survivor
        are not counted: a few bad requests, each the only one at its time, would end the engine for
        everybody, and a new process would fail for them as well.
        """
        if len(culprits) < num_sequences or any(is_out_of_memory(each.error) for each in culprits):
            return
        if not self._canary_lives():
            raise EngineDeadError(
                f"all {num_sequences} sequences of a step failed, and so did a sequence of our own"
            ) from culprits[0].error

    def _canary_lives(self) -> bool:
        return not isolate([self._canary()], attempt=self._forward).culprits

    def _sample(
        self, done: ForwardPass, *, masks: MaskSource | None, void: Collection[SequenceId]
    ) -> list[Outcome]:
        """Every sequence of one pass: tokens, or failures."""
        if self._decodes:
            self._decodes.draws_ahead = masks is None
        if done.drawn is not None and masks is None and not void and all(_soundness(done)):
            return self._take_drawn(done.drawn)
        outcomes: list[Outcome] = []
        runs: list[DraftRun] = []
        row = 0
        for seq, is_sound in zip(done.sequences, _soundness(done), strict=True):
            if not is_sound:
                outcomes.extend(_numerical_error(seq_id) for seq_id in _owners(seq))
            elif seq.num_drafts:
                runs.append(self._draft_run(seq, row=row))
            else:
                runs += [DraftRun(Draw(spec, row)) for spec in seq.samples]
            row += 1 + seq.num_drafts if seq.samples else 0
        if void:
            runs = [run for run in runs if run.first.spec.seq_id not in void]
        if not runs:
            return outcomes
        rows = on_host(done.logits)

        def draw(draws: Sequence[Draw]) -> list[Outcome]:
            return self._draw_all(rows, draws=draws, masks=masks)

        return outcomes + verify(runs, draw=draw, commit=self._sampler.commit)

    def _take_drawn(self, specs: Sequence[SampleSpec]) -> list[Outcome]:
        """What the pass itself drew."""
        outcomes = self._sampler.prepared_outcomes(specs)
        self._sampler.commit([each for each in outcomes if isinstance(each, SampledToken)])
        return outcomes

    def _draft_run(self, seq: ScheduledSequence, *, row: int) -> DraftRun:
        """The draws of a sequence with drafts whose logits begin at `row`."""
        (spec,) = seq.samples
        return DraftRun(
            first=Draw(spec, row),
            drafts=seq.token_ids[-seq.num_drafts :],
            is_free_of_history=self._sampler.is_free_of_history(spec.seq_id),
        )

    def _draw_all(self, logits: Floats, *, draws: Sequence[Draw], masks: MaskSource | None) -> list[Outcome]:
        """The outcome of each draw, in order."""

        def attempt(part: Sequence[Draw]) -> list[Outcome]:
            return self._draw(logits, draws=part, masks=masks)

        taken = isolate(draws, attempt=attempt, on_error=self._shed_if_short)
        drawn = chain.from_iterable(taken.parts)
        if not taken.culprits:
            return list(drawn)
        errors = {culprit.member: culprit.error for culprit in taken.culprits}
        return [
            _failure(each.spec.seq_id, error=errors[each], place="sampler") if each in errors else next(drawn)
            for each in draws
        ]

    def _draw(self, logits: Floats, *, draws: Sequence[Draw], masks: MaskSource | None) -> list[Outcome]:
        specs = [draw.spec for draw in draws]
        if self._faults:
            self._faults.before_sample([spec.seq_id for spec in specs])
        rows = [draw.row for draw in draws]
        allowed = None if masks is None else [masks.row(draw.spec.seq_id, depth=draw.depth) for draw in draws]
        return self._sampler.sample(logits, specs=specs, rows=rows, masks=allowed)


def _inference() -> AbstractContextManager[object]:
    """Torch without gradients; nothing where the engine's loop has entered that already.

    To enter it at each step would cost a tenth of a millisecond.
    """
    return STEADY if torch.is_inference_mode_enabled() else torch.inference_mode()


def _host_blocks(pool: KvPool, *, num_slots: int) -> HostBlocks | None:
    """The offload tier's memory, if there is one."""
    if not num_slots:
        return None
    device = pool.storage.device
    stream = CudaCopyStream(device) if device.type == "cuda" else None
    return HostBlocks(pool.storage, num_slots=num_slots, stream=stream)


def _native_sampler(kernels: KernelSet) -> NativeSampler | None:
    """A sampler on the threads of the kernels, if they have their own."""
    if not kernels.has_own_threads:
        return None
    # Imported here: it needs the extension module, which is there if such kernels are.
    from penstock.kernels.cpu.kernel_set import NativeKernels

    assert isinstance(kernels, NativeKernels)
    return NativeSampler(kernels.machine.pool, isa=kernels.machine.isa)


def _decoded_pass(sequences: Sequence[ScheduledSequence], decoded: DecodedStep) -> ForwardPass:
    ends = range(1, len(sequences) + 1)
    return ForwardPass(
        sequences=sequences,
        ends=ends,
        is_sound=_are_sound(decoded.bad_rows, ends),
        logits=decoded.logits,
        drawn=decoded.drawn,
    )


def _device_sampler(kernels: KernelSet) -> DeviceSampler:
    """Who draws where the logits lie."""
    if kernels.name != "triton":
        return GreedySampler()
    # Imported here: it needs triton, which is there if such kernels are.
    from penstock.engine.sampling.device import TritonSampler

    return TritonSampler()


def _are_sound(bad_rows: Sequence[int], ends: Sequence[int]) -> list[bool]:
    """For each sequence: True where no number of its rows is NaN or infinite.

    Every row counts, not only the sampled ones: a prefill chunk's blocks must not reach the prefix tree.

    Args:
        bad_rows: those that hold such a number, rising.
        ends: for each sequence one past its last row, rising.
    """
    are_sound = [True] * len(ends)
    for row in bad_rows:
        are_sound[bisect_right(ends, row)] = False
    return are_sound


def _soundness(done: ForwardPass) -> Sequence[bool]:
    """`is_sound`, waited for where a device has not told yet."""
    if done.is_sound is not None:
        return done.is_sound
    assert done.bad_rows is not None, "one of the two tells"
    return _are_sound(done.bad_rows.nonzero().flatten().tolist(), done.ends)


def _needs_host(seq: ScheduledSequence) -> bool:
    """True if the host looks at the sequence's rows before the step is collected."""
    return seq.pooling is not None or bool(seq.prompt_targets) or bool(seq.num_drafts)


def _queued(done: ForwardPass, *, void: Collection[SequenceId]) -> QueuedPass | None:
    """A pass for `DeviceDraws`; None where results do not come by a queue."""
    if done.bad_rows is None:
        return None
    drawing = [seq for seq in done.sequences if seq.samples]
    draws = [
        Draw(spec, row) for row, seq in enumerate(drawing) for spec in seq.samples if spec.seq_id not in void
    ]
    return QueuedPass(logits=done.logits, bad_rows=done.bad_rows, draws=draws)


def _outcomes_in_order(done: ForwardPass, read: ReadPass) -> list[Outcome]:
    """Tokens and failures of a pass's sequences, once they are there."""
    errors = {culprit.member.spec.seq_id: culprit.error for culprit in read.culprits}
    outcomes: list[Outcome] = []
    sound = _are_sound(read.bad_rows, done.ends)
    for seq, is_sound, was_sound in zip(done.sequences, sound, done.is_sound or sound, strict=True):
        if not (is_sound and was_sound):
            outcomes.extend(_numerical_error(seq_id) for seq_id in _owners(seq))
            continue
        for spec in seq.samples:
            if spec.seq_id in errors:
                outcomes.append(_failure(spec.seq_id, error=errors[spec.seq_id], place="sampler"))
            elif spec.seq_id in read.outcomes:
                outcomes.append(read.outcomes[spec.seq_id])
    return outcomes


def _owners(seq: ScheduledSequence) -> Sequence[SequenceId]:
    """Who is answered if `seq` fails: all that draw from it, or itself."""
    return [spec.seq_id for spec in seq.samples] or [seq.seq_id]


def _numerical_error(seq_id: SequenceId) -> SequenceFailure:
    return SequenceFailure(seq_id, "numerical_error", "the model's activations are not finite numbers")


def _short_of_memory(seq_id: SequenceId) -> SequenceFailure:
    return SequenceFailure(seq_id, OUT_OF_MEMORY, "there was not enough memory")


def _all_short_of_memory(plan: StepPlan) -> list[SequenceFailure]:
    return [_short_of_memory(seq_id) for seq in plan.sequences for seq_id in _owners(seq)]


def _failure(seq_id: SequenceId, *, error: Exception, place: str) -> SequenceFailure:
    if is_out_of_memory(error):
        return _short_of_memory(seq_id)
    return _step_error(seq_id, error=error, place=place)


def _step_error(seq_id: SequenceId, *, error: Exception, place: str) -> SequenceFailure:
    """The client reads the kind of the error; its text, which may tell more, goes to the log."""
    log.error("the %s failed for sequence %d", place, seq_id, exc_info=error)
    return SequenceFailure(
        seq_id, "step_error", f"the {place} failed for this sequence: {type(error).__name__}"
    )
