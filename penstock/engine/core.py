"""The step: schedule, launch, draw, collect, apply.

`EngineCore` joins the pure half (scheduler, KV manager) and the half that computes (a rank group). It
is driven by `loop`; it knows no processes, no asyncio and no text.

One step of asynchrony: step n + 1 is planned and launched before the outcome of step n is taken in, so that
whoever computes always has work while the host does its part.

```
host     schedule(n+1) launch(n+1) | collect(n) waits | apply(n) draw(n+1) | schedule(n+2) ...
device   ...... step n ..........................>  step n+1 ............................>
```

Draws of step n + 1 are started once step n is applied: only then are the grammars where they must be, and is
it known whose answer has ended.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from penstock.core.errors import InvalidParameterError, PenstockError
from penstock.core.ids import RequestId, SequenceId
from penstock.core.tokens import EngineInfo, EngineRequest, MemoryReport, RequestReport
from penstock.engine.grammar.bitmask import MaskFiller
from penstock.engine.grammar.compile_pool import CompiledRequest, CompilePool
from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.lora.host import AdapterHost
from penstock.engine.runner.device_memory import DeviceMemory
from penstock.engine.runner.rank_group import RankGroup
from penstock.engine.runner.step_handle import StepHandle
from penstock.engine.scheduler.plan import StepPlan, StepResult
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.scheduler.settlement import StepOutput
from penstock.observe.memory import resident_bytes, settle

ADAPTER_WAIT_S: Final = 0.002
"""How long a step without work waits for an adapter that is being read, before it looks again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedStep:
    """A step that the ranks compute."""

    plan: StepPlan
    handle: StepHandle
    launched_s: float


@dataclass(slots=True)
class HostTime:
    """The host's part of a step that no computation hides: from the end of one step to the next one's launch.

    Without asynchrony that is all that the host does; with it, what is left when the step was too short.
    """

    _last_end_s: float | None = None

    def before(self, step: LaunchedStep, result: StepResult) -> float:
        """Seconds, 0 for a step without work and for the first after an idle time."""
        last_end_s, self._last_end_s = self._last_end_s, None
        if not step.plan.has_work:
            return 0.0
        self._last_end_s = result.ended_s
        return 0.0 if last_end_s is None else max(0.0, step.launched_s - last_end_s)

    def rest(self) -> None:
        """There is no work: what passes until there is some is nobody's."""
        self._last_end_s = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCore:
    """One model replica: requests in, deltas out, one step at a time."""

    scheduler: Scheduler
    kv: KvManager
    ranks: RankGroup
    info: EngineInfo
    grammars: CompilePool
    masks: MaskFiller
    adapters: AdapterHost | None = None
    """None where adapters are not enabled."""
    device_memory: DeviceMemory | None = None
    """None where the host's memory is used."""
    prepare: Callable[[], bool] = lambda: False
    """Does a bit of what makes later steps faster, while there is no step; False if nothing is left of it."""
    is_async: bool = False
    """Leave a step under way from one call of `step` to the next."""
    under_way: deque[LaunchedStep] = field(default_factory=deque)
    """The step that was launched last and is yet to be applied: at most one between two calls of `step`."""
    host_time: HostTime = field(default_factory=HostTime)

    @property
    def has_work(self) -> bool:
        """True if `step` would do something."""
        return self.scheduler.has_work

    def add(self, request: EngineRequest) -> None:
        """Queue a request; a grammar is compiled here and now. The loop uses `add_compiled`.

        Raises:
            QueueFullError: the queue is at its limit.
            InvalidParameterError: the request can never fit, or its grammar cannot be enforced.
            NotFoundError: its adapter is not there (any more).
        """
        constraint = None if request.grammar is None else self.grammars.compile_now(request)
        self.scheduler.add(self._with_version(request), constraint=constraint)

    def add_compiled(self, done: CompiledRequest) -> None:
        """Queue a request whose grammar has been through `grammars`.

        Raises:
            PenstockError: its grammar was refused, or `add` would refuse it.
        """
        if isinstance(done.outcome, PenstockError):
            raise done.outcome
        self.scheduler.add(self._with_version(done.request), constraint=done.outcome)

    def _with_version(self, request: EngineRequest) -> EngineRequest:
        """The request with the version that its adapter's name stands for now."""
        if not request.adapter:
            return request
        if self.adapters is None:
            raise InvalidParameterError("model names an adapter, the engine has none", param="model")
        return msgspec.structs.replace(request, adapter_revision=self.adapters.resolve(request))

    def abort(self, request_id: RequestId) -> None:
        """Forget a request; its blocks are free after the step under way. Unknown ids are ignored."""
        self.grammars.abort(request_id)
        self.scheduler.abort(request_id)

    def step(self) -> StepOutput:
        """One step of the whole engine: one is launched, one is applied, not the same with asynchrony.

        Raises:
            EngineDeadError: the fault is in no single request.
        """
        settled = self._settle() if self.scheduler.needs_result else None
        step = self._launch()
        settled = self._settle() or settled
        self._draw(step)
        if not self.is_async:
            settled = self._settle()
        return settled or self.scheduler.output_of_no_step()

    def _launch(self) -> LaunchedStep:
        if self.adapters is not None:
            self.adapters.poll()
        plan = self.scheduler.schedule()
        is_idle = not any(each.has_work for each in (plan, *(step.plan for step in self.under_way)))
        if self.adapters is not None and self.adapters.is_busy and is_idle:
            self.adapters.wait(ADAPTER_WAIT_S)
        launched_s = time.perf_counter()
        return LaunchedStep(plan=plan, handle=self.ranks.launch(plan), launched_s=launched_s)

    def _settle(self) -> StepOutput | None:
        """Take in what the step under way produced; None if there is none."""
        if not self.under_way:
            return None
        step = self.under_way.popleft()
        result = self.ranks.collect(step.handle)
        host_time_s = self.host_time.before(step, result)
        output = self.scheduler.apply(step.plan, result, host_time_s=host_time_s)
        if not self.scheduler.has_work:
            self.host_time.rest()
        return output

    def _draw(self, step: LaunchedStep) -> None:
        void = self.scheduler.void_draws(step.plan) if self.is_async else frozenset[SequenceId]()
        masks = self.masks.fill(step.plan, self.scheduler.constraints, void=void)
        self.ranks.draw(step.handle, masks=masks, void=void)
        self.under_way.append(step)

    def pause(self) -> None:
        """Let what runs go back into the queue with the next steps; see `fall_asleep`."""
        self.scheduler.pause()

    def fall_asleep(self) -> StepOutput | None:
        """Give memory back, once the scheduler is quiet: all KV is lost, requests wait for `wake_up`.

        Returns:
            What the step under way still gave.
        """
        output = self._settle()
        self.kv.drop_cache()
        self.ranks.sleep()
        settle()
        return output

    def wake_up(self) -> None:
        """Take the memory again and go on."""
        self.ranks.wake_up()
        self.scheduler.resume()

    def requests(self) -> list[RequestReport]:
        """Every request, waiting and running."""
        return self.scheduler.reports()

    def memory(self) -> MemoryReport:
        """Who holds which bytes."""
        usage = self.kv.usage()
        per_block = self.info.bytes_per_block
        return MemoryReport(
            weights_bytes=self.info.weights_bytes,
            kv_bytes_total=usage.num_blocks * per_block,
            kv_bytes_free=usage.num_free * per_block,
            kv_bytes_cached=usage.num_cached * per_block,
            kv_bytes_owned=usage.num_owned * per_block,
            prefix_tree_nodes=usage.num_tree_nodes,
            prefix_tree_bytes=usage.tree_bytes,
            buffer_bytes=self.ranks.buffer_bytes
            + self.masks.num_bytes
            + self.grammars.compiler.num_bytes
            + self.scheduler.drafting_bytes,
            offload_bytes_total=self.info.kv_offload_bytes,
            offload_bytes_used=self.scheduler.host_bytes_used,
            activation_bytes=self.info.activation_bytes,
            graph_bytes=self.info.graph_bytes,
            device_bytes_total=self.info.device_bytes,
            device_bytes_used=0 if self.device_memory is None else self.device_memory.used_bytes,
            process_rss_bytes=resident_bytes(),
        )
