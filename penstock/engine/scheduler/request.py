"""A request in the engine: a group of sequences that is admitted, preempted and ended as a whole.

State only; the scheduler decides. The group's state:

```
              admit                         all answers ended
  waiting ------------------> running -----------------------> finished
   |  ^  |                     ^   |                              ^
   |  |  |    preempt          |   |                              |
   |  +--|---------------------|---+                              |
   |     | admit with a load   | load ended                       |
   |     +-----> waiting_kv ---+                                  |
   |                 |                                            |
   +-----------------+--------- abort, failure -------------------+
```

A sequence has no phases, only a gap to close (law 2):

```
 token_ids  [0 ........ num_computed) [num_computed .. + num_inflight) [ ........ num_tokens)
             KV in the pool            in a step under way              still to schedule
```

Drafts in flight lie beyond `num_tokens`; those that are confirmed become tokens and are computed already, the
others were never there. So does a pending token: a step under way draws it, and another computes it already
(see `lookahead`).
"""

import enum
from dataclasses import dataclass, field
from typing import Final

from penstock.core.ids import SequenceId
from penstock.core.text import FinishReason, TokenLogprobs
from penstock.core.tokens import EngineRequest, RequestStats
from penstock.engine.kv.block_table import SequenceBlocks
from penstock.engine.scheduler.beams import BeamSearch
from penstock.engine.scheduler.constraint import Constraint

MASK_64: Final = (1 << 64) - 1
GOLDEN_GAMMA: Final = 0x9E3779B97F4A7C15


class GroupState(enum.StrEnum):
    """Where a request is; see the module for the transitions."""

    WAITING = "waiting"
    WAITING_KV = "waiting_kv"
    RUNNING = "running"
    FINISHED = "finished"


TRANSITIONS: Final = {
    GroupState.WAITING: {GroupState.RUNNING, GroupState.WAITING_KV, GroupState.FINISHED},
    GroupState.WAITING_KV: {GroupState.RUNNING, GroupState.FINISHED},
    GroupState.RUNNING: {GroupState.WAITING, GroupState.FINISHED},
    GroupState.FINISHED: set[GroupState](),
}


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK_64
    return z ^ (z >> 31)


def derive_seed(seed: int, *, answer_idx: int) -> int:
    """An independent 64-bit seed for one answer of a request.

    The request's seed is mixed before it becomes the counter's start: otherwise answer 1 of seed 5 would be
    answer 0 of seed 6.

    **Source:** Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014 (splitmix64, here
    addressed by its counter).
    """
    start = _mix((seed + GOLDEN_GAMMA) & MASK_64)
    return _mix((start + (answer_idx + 1) * GOLDEN_GAMMA) & MASK_64)


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One answer of a request; see the module."""

    seq_id: SequenceId
    group: "SequenceGroup"
    index: int
    """Which answer, 0 to n - 1."""
    seed: int
    """64-bit seed of this answer's draws."""
    token_ids: list[int]
    """Prompt and answer; the request's own list until the sequence first runs."""
    blocks: SequenceBlocks
    num_prompt_tokens: int
    num_computed_tokens: int = 0
    num_inflight_tokens: int = 0
    """Drafts included."""
    num_inflight_drafts: int = 0
    is_retrying: bool = False
    """A step did not compute its tokens; what is under way behind them is of no use."""
    num_memory_failures: int = 0
    """Times in a row that not even the least part of it could be computed."""
    num_draws: int = 0
    """Tokens that the answer has once the draw that was planned last is known."""
    is_known_to_runner: bool = False
    finish_reason: FinishReason | None = None
    constraint: Constraint | None = None
    """Has accepted the answer's tokens, whatever became of its blocks; None if anything may follow."""

    @property
    def num_tokens(self) -> int:
        """Tokens known, prompt and answer."""
        return len(self.token_ids)

    @property
    def num_outputs(self) -> int:
        """Tokens of the answer."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that steps under way draw for it: at most one, or two once a second step is planned."""
        return max(0, self.num_draws - self.num_outputs)

    @property
    def is_held(self) -> bool:
        """True until what is of no use is no longer under way: then it goes on where it was."""
        return self.is_retrying and self.num_inflight_tokens > 0

    @property
    def next_position(self) -> int:
        """First position that is neither computed nor under way."""
        return self.num_computed_tokens + self.num_inflight_tokens

    def own_tokens(self) -> None:
        """Stop sharing the prompt's list, before the first token is appended."""
        if self.token_ids is self.group.request.prompt_token_ids:
            self.token_ids = list(self.token_ids)

    def restart(self) -> None:
        """Everything is to be computed again; the blocks have been freed."""
        assert self.num_inflight_tokens == 0, "a sequence in flight cannot restart"
        self.num_computed_tokens = 0
        self.num_draws = 0


@dataclass(slots=True, eq=False, kw_only=True)
class SequenceGroup:
    """One request: its answers, its place in the queue and what is told at its end."""

    request: EngineRequest
    arrival_idx: int
    """Order of arrival in this engine; kept through preemptions."""
    arrival_s: float
    tier: int
    """Priority as the policy sees it; lower is served first."""
    num_prompt_tokens: int
    num_blocks_max: int
    """Most blocks it can ever hold at once."""
    state: GroupState = GroupState.WAITING
    sequences: list[Sequence] = field(default_factory=list)
    live: list[Sequence] = field(default_factory=list)
    """Answers that have not ended."""
    is_forked: bool = False
    """The prompt is computed and the live answers have tables of their own."""
    is_tainted: bool = False
    """Its KV may hold NaN."""
    num_preemptions: int = 0
    num_deferrals: int = 0
    """Steps in a row in which it waited for a prefix that another request was computing."""
    num_deferred_blocks: int = 0
    """Length of its prefix hit, in blocks, when it was last held back."""
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    beams: BeamSearch | None = None
    """Its search, if it is one; its sequences are the beams then, in the order of the search."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of the prompt from its second token on, as far as computed; None if not asked for, or told."""
    first_scheduled_s: float | None = None
    batch_size: int = 0
    kv_usage: float = 0.0
    reserved_blocks: int = 0
    """Blocks set aside for it while it runs protected."""
    adapter_slot: int = -1
    """Where its adapter lies in the runner while it runs; -1 for the base model."""
    is_loading: bool = False
    """A connector fills its blocks."""

    @property
    def is_busy(self) -> bool:
        """True if a step or a load under way uses its blocks."""
        return self.is_loading or any(seq.num_inflight_tokens for seq in self.sequences)

    @property
    def needs_fork(self) -> bool:
        """True if one sequence computes the prompt for several."""
        return not self.is_forked and len(self.live) > 1

    @property
    def active(self) -> list[Sequence]:
        """Answers that may be scheduled: all, or the one that computes the prompt for them."""
        return self.live[:1] if self.needs_fork else self.live

    def target(self, seq: Sequence) -> int:
        """Number of tokens to compute before something else must happen to `seq`."""
        return self.num_prompt_tokens if self.needs_fork else len(seq.token_ids)

    @property
    def open_answers(self) -> list[int]:
        """Indices of the answers that are yet to end; a search ends all of its answers at once."""
        return [seq.index for seq in self.live] if self.beams is None else list(range(self.request.params.n))

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """True if some of the prompt's logprobs are yet to be computed."""
        told = self.prompt_logprobs
        return told is not None and len(told) < self.num_prompt_tokens - 1

    @property
    def needs_whole_prompt(self) -> bool:
        """True if what is asked needs every row of the prompt, so that cached blocks do not help."""
        pooling = self.request.pooling
        return self.lacks_prompt_logprobs or (pooling is not None and pooling.kind == "mean")

    @property
    def ends_with_prompt(self) -> bool:
        """True if no token is asked for: it ends once its prompt is computed."""
        return self.request.max_tokens == 0

    def take_prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        """What is told once: one entry a prompt token, None for the first; None if it was not asked for."""
        told, self.prompt_logprobs = self.prompt_logprobs, None
        return None if told is None else (None, *told)

    def move_to(self, state: GroupState) -> None:
        """Change state; anything but a drawn arrow is our bug."""
        assert state in TRANSITIONS[self.state], f"{self.state} to {state} is not a legal transition"
        self.state = state

    def stats(self, *, now_s: float) -> RequestStats:
        """What is told with the last delta."""
        started_s = now_s if self.first_scheduled_s is None else self.first_scheduled_s
        return RequestStats(
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_generated_tokens=self.num_generated_tokens,
            queue_wait_s=started_s - self.arrival_s,
            batch_size=self.batch_size,
            kv_usage=self.kv_usage,
            num_preemptions=self.num_preemptions,
            inference_s=now_s - started_s,
        )
