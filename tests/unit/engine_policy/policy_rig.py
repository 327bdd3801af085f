"""A scheduler with tiny limits and a runner that answers with given tokens."""

import random
from collections.abc import Callable, Container

from penstock.core.ids import RequestId, TenantId
from penstock.core.params import SamplingParams
from penstock.core.ports import KvConnector
from penstock.core.text import Priority
from penstock.core.tokens import EngineRequest, TokenDelta
from penstock.engine.config import SchedulerConfig
from penstock.engine.kv.cache_groups import make_cache_layout
from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.scheduler.constraint import Constraint
from penstock.engine.scheduler.drafting import Proposer
from penstock.engine.scheduler.plan import (
    NO_TRAFFIC,
    HostTraffic,
    SampledToken,
    SequenceFailure,
    StepPlan,
    StepResult,
)
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.scheduler.settlement import StepOutput
from penstock.sim.clock import VirtualClock

TokenSource = Callable[[int, int], int]


def request(
    name: str, prompt: list[int], *, max_tokens: int = 4, tenant: str = "t", **kwargs
) -> EngineRequest:
    """A request; keyword arguments that are not its own are sampling parameters."""
    own = {
        key: kwargs.pop(key) for key in ("eos_token_ids", "cache_salt", "adapter_revision") if key in kwargs
    }
    return EngineRequest(
        request_id=RequestId(name),
        prompt_token_ids=prompt,
        tenant_id=TenantId(tenant),
        priority=kwargs.pop("priority", Priority.INTERACTIVE),
        params=SamplingParams(max_tokens=max_tokens, **kwargs),
        **own,
    )


class Rig:
    """Scheduler, pool, clock, and the loop of the engine."""

    def __init__(
        self,
        *,
        num_blocks: int = 32,
        block_size: int = 4,
        windows: tuple[int | None, ...] = (None,),
        caching: bool = True,
        connector: KvConnector | None = None,
        proposer: Proposer | None = None,
        **config,
    ) -> None:
        self.kv = KvManager(
            make_cache_layout(windows),
            num_blocks=num_blocks,
            block_size=block_size,
            enable_prefix_caching=caching,
        )
        self.clock = VirtualClock()
        config = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 256} | config
        self.scheduler = Scheduler(
            SchedulerConfig(enable_prefix_caching=caching, **config),
            kv=self.kv,
            clock=self.clock,
            rng=random.Random(0),
            connector=connector,
            proposer=proposer,
        )
        self.deltas: list[TokenDelta] = []

    def add(self, name: str, prompt: list[int], *, constraint: Constraint | None = None, **kwargs) -> None:
        self.scheduler.add(request(name, prompt, **kwargs), constraint=constraint)

    def finish(
        self,
        plan: StepPlan,
        *,
        token: int | TokenSource = 9,
        failures: dict[int, str] | None = None,
        step_time_s: float = 0.01,
        host_traffic: HostTraffic = NO_TRAFFIC,
        num_out_of_memory: int = 0,
        void: Container[int] = (),
    ) -> StepOutput:
        """Apply a plan with the given outcome; nothing is drawn for `void` sequences."""
        failures = failures or {}
        tokens = [
            SampledToken(
                spec.seq_id, token if isinstance(token, int) else token(spec.seq_id, spec.output_idx)
            )
            for entry in plan.sequences
            for spec in entry.samples
            if spec.seq_id not in failures and spec.seq_id not in void
        ]
        result = StepResult(
            step_id=plan.step_id,
            tokens=tokens,
            failures=[SequenceFailure(seq_id, code, "injected") for seq_id, code in failures.items()],
            step_time_s=step_time_s,
            host_traffic=host_traffic,
            num_out_of_memory=num_out_of_memory,
        )
        self.clock.advance(step_time_s)
        output = self.scheduler.apply(plan, result)
        self.deltas.extend(output.deltas)
        return output

    def step(self, **outcome) -> tuple[StepPlan, StepOutput]:
        plan = self.scheduler.schedule()
        return plan, self.finish(plan, **outcome)

    def run(self, *, max_steps: int = 1000, **outcome) -> list[TokenDelta]:
        """Step until nothing is left; returns all deltas."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return self.deltas
            self.step(**outcome)
        raise AssertionError(f"not done after {max_steps} steps")

    def of(self, name: str) -> list[TokenDelta]:
        return [delta for delta in self.deltas if delta.request_id == name]


def shape(plan: StepPlan) -> list[tuple[int, int, int]]:
    """(sequence, first position, number of tokens) of every entry."""
    return [(entry.seq_id, entry.start, len(entry.token_ids)) for entry in plan.sequences]
