"""One rank's execution of a plan: inputs, model, logits, tokens.

`launch` computes, `draw` samples, `collect` answers; nothing else crosses. The runner decides nothing and
keeps nothing of a sequence but what sampling needs and the token that it drew last. It joins the parts of a
step, each in a file of its own, to be read in this order; `rank_group` calls it.

```
launch     last_tokens         what the step before drew, in place of PENDING_TOKEN
           step_passes         one pass, or several where somebody raises
             forward           inputs > hidden states > logits, or a replay of all three
             inspection        who is sound, what was asked of the prompts
draw       step_draws          who draws: host_draws now, or device_draws behind a queue
collect    step_draws.read     waits for the queue; tokens, failures
```

With one step of asynchrony the calls of two steps alternate, and each step's own are still in order:

```
launch(n)  draw(n)  launch(n+1)  collect(n)  [the scheduler applies n]  draw(n+1)  launch(n+2)  collect(n+1)
```

So `draw(n)` comes before `launch(n+1)`: the tokens that step n + 1 computes in place of `PENDING_TOKEN` are
those that `draw(n)` chose.
"""

import time
from collections.abc import Callable, Collection, Sequence
from functools import partial

from penstock.core.ids import SequenceId
from penstock.engine.kv.cache_groups import CacheLayout
from penstock.engine.runner.bound_adapters import BoundAdapters
from penstock.engine.runner.canary import make_canary
from penstock.engine.runner.cuda_graphs import DecodeGraphs
from penstock.engine.runner.decode_steps import decode_steps
from penstock.engine.runner.device_draws import DeviceDraws
from penstock.engine.runner.device_memory import DeviceMemory, memory_of
from penstock.engine.runner.failures import short_of_memory
from penstock.engine.runner.faults import FaultPoints
from penstock.engine.runner.forward import Forward
from penstock.engine.runner.host_blocks import host_blocks
from penstock.engine.runner.host_draws import HostDraws
from penstock.engine.runner.inference import inference_mode
from penstock.engine.runner.input_batch import InputBatchBuilder
from penstock.engine.runner.kv_pool import KvPool, pool_for
from penstock.engine.runner.last_tokens import LastTokens
from penstock.engine.runner.memory_shortage import MemoryShortage
from penstock.engine.runner.pooling import Pools
from penstock.engine.runner.recordings import Recordings
from penstock.engine.runner.rehearsal import Rehearsal
from penstock.engine.runner.samplers import host_sampler
from penstock.engine.runner.step_draws import StepDraws
from penstock.engine.runner.step_handle import StepHandle
from penstock.engine.runner.step_passes import StepPasses
from penstock.engine.runner.stored_weights import StoredWeights
from penstock.engine.runner.warmup import StepPeaks
from penstock.engine.sampling.masks import MaskSource
from penstock.engine.sampling.ports import DeviceSampler
from penstock.engine.sampling.sampler import Sampler
from penstock.engine.scheduler.cost import TimedStep
from penstock.engine.scheduler.plan import (
    NO_TRAFFIC,
    HostTraffic,
    Pooled,
    SampledToken,
    ScheduledSequence,
    SequenceFailure,
    StepPlan,
    StepResult,
)
from penstock.engine.spec.proposer import Guesses, RunnerProposer
from penstock.kernels.adapters import AdapterWeights
from penstock.kernels.batch import ForwardBatch
from penstock.models.interface import CausalLM, LoadedModel


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
        device_sampler: DeviceSampler | None = None,
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
            device_sampler: draws where the logits lie, for a model whose passes run behind a queue.
            faults: where tests make it fail; None in production.
            num_adapter_slots: different adapters in one step, 0 without adapters.
            adapter_weights: of a version that is bound to a slot.
            make_drafter: makes who guesses tokens here, given the sampler; None if nobody does.
            make_graphs: makes the recordings of decode steps; None runs every step launch by launch.
            is_alone: False if other ranks compute every pass too.
        """
        assert loaded.is_queued == (device_sampler is not None), "draws are queued where passes are"
        self._loaded = loaded
        self._pool = pool = pool_for(loaded, layout, num_blocks=num_blocks, block_size=block_size)
        num_groups = len(layout.groups)
        self._canary = make_canary(scratch_block=pool.scratch_block, num_groups=num_groups)
        self._host_blocks = host_blocks(pool.storage, num_slots=num_host_blocks)
        self._weights = StoredWeights(loaded.model)
        self._shortage = MemoryShortage(memory_of(loaded.device), is_alone=is_alone)
        self._inputs = InputBatchBuilder(layout, pool=pool)
        self._adapters = BoundAdapters(num_slots=num_adapter_slots, weights_of=adapter_weights)
        self._sampler = host_sampler(loaded.kernels)
        self._drafter = None if make_drafter is None else make_drafter(self._sampler)
        self._last_tokens = LastTokens()
        self._recordings = Recordings(None if make_graphs is None else partial(make_graphs, pool))
        self._pools = Pools()
        self._forward = Forward(
            loaded,
            inputs=self._inputs,
            adapters=self._adapters,
            last_tokens=self._last_tokens,
            decodes=decode_steps(loaded, inputs=self._inputs, sampler=self._sampler),
            recordings=self._recordings,
            faults=faults,
        )
        self._passes = StepPasses(
            self._forward, canary=self._canary, shortage=self._shortage, is_alone=is_alone
        )
        self._queue = self._make_queue(device_sampler, faults) if device_sampler else None
        self._draws = self._make_draws(faults)
        self._rehearsal = Rehearsal(
            pool=pool,
            num_groups=num_groups,
            sampler=self._sampler,
            drafter=self._drafter,
            forward=self._forward,
            draws=self._draws,
            compiles=loaded.device.type == "cuda",
        )

    def _make_queue(self, device_sampler: DeviceSampler, faults: FaultPoints | None) -> DeviceDraws:
        return DeviceDraws(
            self._sampler,
            device_sampler=device_sampler,
            device=self._loaded.device,
            before_sample=faults.before_sample if faults else None,
            on_error=self._shortage.relieve_if_short,
        )

    def _make_draws(self, faults: FaultPoints | None) -> StepDraws:
        host = HostDraws(
            self._sampler,
            decodes=self._forward.decodes,
            before_sample=faults.before_sample if faults else None,
            on_error=self._shortage.relieve_if_short,
        )
        return StepDraws(self._sampler, host=host, queue=self._queue, last_tokens=self._last_tokens)

    @property
    def model(self) -> CausalLM:
        """What it runs, for profiles."""
        return self._loaded.model

    @property
    def buffer_bytes(self) -> int:
        """Bytes kept beside KV and weights: activations, scratch block, tables, sampling states, sums."""
        own = self._pool.bytes_per_block + self._inputs.buffer_bytes + self._sampler.num_bytes
        own += self._pools.num_bytes + self._recordings.num_bytes
        own += self._queue.num_bytes if self._queue else 0
        own += self._drafter.buffer_bytes if self._drafter else 0
        return own + self._loaded.buffer_bytes()

    def launch(self, plan: StepPlan) -> StepHandle:
        """Prepare blocks and run the model; needs no result of an earlier step to be applied.

        Args:
            plan: what to compute. Its block tables are read during this call only.

        Returns:
            The handle for `draw` and `collect`.

        Raises:
            EngineDeadError: the model fails for every sequence, and so does the canary.
        """
        began_s = time.perf_counter()
        with inference_mode():
            handle = self._launch(plan)
        handle.launch_time_s = time.perf_counter() - began_s
        return handle

    def _launch(self, plan: StepPlan) -> StepHandle:
        self._sampler.add(plan.new_sequences)
        self._sampler.commit_forced(plan.forced_tokens)
        self._adapters.bind(plan.adapter_bindings)
        self._pool.zero_blocks(plan.blocks_to_zero)
        self._pool.copy_blocks(plan.block_copies)
        if self._host_blocks is not None:
            self._host_blocks.begin(plan.host_moves)
        handle = StepHandle(plan=plan)
        try:
            handle.guesses = self._guess(plan, self._last_tokens.put_in_place(plan.sequences))
            if handle.guesses.sequences:
                handle.passes, handle.failures = self._passes.compute(handle.guesses.sequences)
        except Exception as error:  # noqa: BLE001 - all but one kind are raised again
            self._shortage.relieve(error)
            handle.passes, handle.failures = [], short_of_memory(plan.sequences)
        return handle

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
        began_s = time.perf_counter()
        with inference_mode():
            # Not before: the step before it, drawn later than this step was planned, may still know them.
            self._forget(handle.plan.finished_seq_ids)
            try:
                self._draws.start(handle, masks=masks, void=void)
            except Exception as error:  # noqa: BLE001 - all but one kind are raised again
                self._shortage.relieve(error)
                self._draws.give_up(handle)
        handle.ended_s = time.perf_counter()
        handle.draw_time_s = handle.ended_s - began_s

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
        with inference_mode():
            outcomes = self._draws.read(handle)
        return StepResult(
            step_id=handle.plan.step_id,
            tokens=[outcome for outcome in outcomes if isinstance(outcome, SampledToken)],
            failures=[outcome for outcome in outcomes if isinstance(outcome, SequenceFailure)],
            prompt_logprobs=[part for done in handle.passes for part in done.prompt_logprobs],
            pooled=self._take_pooled(handle),
            proposals=handle.guesses.proposals,
            num_caught_up_tokens=handle.guesses.num_caught_up_tokens,
            host_traffic=self._host_traffic(handle),
            num_out_of_memory=self._shortage.take_count(),
            step_time_s=handle.launch_time_s + handle.draw_time_s + time.perf_counter() - began_s,
            ended_s=handle.ended_s,
        )

    def _take_pooled(self, handle: StepHandle) -> list[Pooled]:
        """What the step's chunks add to the vectors of their prompts."""
        taken = [self._pools.take(part) for done in handle.passes for part in done.pools]
        return [pooled for pooled in taken if pooled is not None]

    def _host_traffic(self, handle: StepHandle) -> HostTraffic:
        if self._host_blocks is None:
            return NO_TRAFFIC
        return self._host_blocks.take_done(wait=not handle.guesses.sequences)

    def warm_up(
        self, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
    ) -> list[TimedStep]:
        """Run the largest steps and record decodes, so that no request meets a first time.

        See `Rehearsal.warm_up`.
        """
        timed = self._rehearsal.warm_up(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
        )
        with inference_mode():
            self._recordings.record_at_start(self._example)
        return timed

    def measure_peaks(
        self, memory: DeviceMemory, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
    ) -> StepPeaks:
        """Run the steps that take the most memory; see `Rehearsal.measure_peaks`."""
        return self._rehearsal.measure_peaks(
            memory,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
        )

    def sleep(self) -> None:
        """Give memory back until `wake_up`: KV is lost, weights on a device go to host memory.

        No step may be under way. The offload tier stays: it is host memory.
        """
        self._recordings.drop()
        self._last_tokens.clear()
        self._pool.release()
        self._weights.put_aside()
        if self._drafter:
            self._drafter.release()
        self._shortage.empty_cache()

    def wake_up(self) -> None:
        """Take it again; decode steps are recorded anew as the engine finds time."""
        self._weights.bring_back()
        self._pool.restore()
        if self._drafter:
            self._drafter.restore()
        self._recordings.renew()

    def record_next(self) -> bool:
        """Record one more kind of decode step, while there is nothing else to do; False if none is left."""
        with inference_mode():
            return self._recordings.record_next(self._example)

    def _example(self) -> ForwardBatch:
        """A step where only the shape of one counts."""
        return self._inputs.build([self._canary])
