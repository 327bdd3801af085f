"""The seam between scheduling and execution: plain, serialisable data.

The scheduler writes a `StepPlan`, the runner reads it and answers with a `StepResult`; nothing else
crosses. A plan can be broadcast to ranks as it is.
"""

from typing import Final

import msgspec

from penstock.core.ids import SequenceId
from penstock.core.params import SamplingParams
from penstock.core.text import TokenLogprobs
from penstock.core.tokens import Pooling
from penstock.engine.kv.host_tier import HostMove

OUT_OF_MEMORY: Final = "out_of_memory"
"""`SequenceFailure.code` of a sequence for which there was not enough memory, though it was alone."""
UNKNOWN_DRAFT: Final = -1
"""In place of a draft's token: a model of the runner is to guess it."""
PENDING_TOKEN: Final = -2
"""In place of a sequence's one next token: what the step before draws for it. The plan was made before that
was known; the runner, which computes steps in order, puts it in its place on its own side."""


class NewSequence(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence that the runner's sampler meets for the first time (also a fork)."""

    seq_id: SequenceId
    params: SamplingParams
    seed: int
    """Concrete 64-bit seed of this answer; the draw for its k-th token depends on (seed, k) alone."""
    prompt_token_ids: list[int]
    """For penalties and `min_tokens`."""
    banned_until_min_tokens: tuple[int, ...] = ()
    """End-of-sequence and stop ids that `min_tokens` forbids at first."""
    banned_sequences: tuple[tuple[int, ...], ...] = ()
    dry_breaker_ids: tuple[int, ...] = ()
    """Both as in the request."""


class SampleSpec(msgspec.Struct, frozen=True, array_like=True):
    """Draw one token for `seq_id` from a row's last logits; several specs may share one row (`n`)."""

    seq_id: SequenceId
    output_idx: int
    """How many tokens the answer has already: 0 for its first."""


class ScheduledSequence(msgspec.Struct, frozen=True, array_like=True):
    """A run of tokens to compute for one sequence in this step.

    ```
    token ids      [0 ......... start) [start ..... start + len(token_ids))
                    KV already there    written by this step
    ```

    With one step of asynchrony the step before may still write the KV before `start`, and the run may be one
    `PENDING_TOKEN`.
    """

    seq_id: SequenceId
    token_ids: list[int]
    start: int
    """Position of the first of `token_ids`."""
    block_tables: tuple[list[int], ...]
    """One table per cache group; entry i holds positions [i * block_size, (i + 1) * block_size).
    Blocks behind a window that were freed are -1."""
    samples: tuple[SampleSpec, ...] = ()
    """Empty for a prefill chunk that is not the last."""
    num_drafts: int = 0
    """The last so many of `token_ids` are guesses: a token is drawn after each of them, and after the token
    before them, up to the first guess that the draw does not confirm. At most one sample then.
    `UNKNOWN_DRAFT` stands for guesses that the runner is to make."""
    adapter_slot: int = -1
    """Where the sequence's LoRA adapter lies in the runner, -1 for the base model."""
    prompt_targets: tuple[int, ...] = ()
    """The logprob of entry i after the i-th of `token_ids` is wanted; not longer than those."""
    num_prompt_logprobs: int = 0
    """So many alternatives beside each of them."""
    pooling: Pooling | None = None


class ForcedTokens(msgspec.Struct, frozen=True, array_like=True):
    """Tokens that an answer gained without a draw, because its grammar allowed nothing else."""

    seq_id: SequenceId
    token_ids: tuple[int, ...]


class BlockCopy(msgspec.Struct, frozen=True, array_like=True):
    """Copy on write: before the step, copy block `src` to block `dst` in all layers."""

    src: int
    dst: int


class AdapterBinding(msgspec.Struct, frozen=True, array_like=True):
    """From this step on a slot holds a version of an adapter; "" empties it."""

    slot: int
    revision: str


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All that one step does."""

    step_id: int
    sequences: list[ScheduledSequence]
    new_sequences: list[NewSequence] = []
    forced_tokens: list[ForcedTokens] = []
    """What answers gained so since the last plan; the sampler counts it as if it had drawn it."""
    finished_seq_ids: list[SequenceId] = []
    """Sequences whose sampling state the runner may forget."""
    block_copies: list[BlockCopy] = []
    blocks_to_zero: list[int] = []
    """Blocks that held NaN; zeroed before anything else."""
    adapter_bindings: list[AdapterBinding] = []
    """In their order, before anything is computed."""
    host_moves: list[HostMove] = []
    """Copies to begin in their order, after blocks were zeroed and copied; they may outlast the step."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(len(seq.token_ids) for seq in self.sequences)

    @property
    def has_work(self) -> bool:
        """False if the step would compute nothing."""
        return bool(self.sequences)


class SampledToken(msgspec.Struct, frozen=True, array_like=True):
    """The token drawn for one `SampleSpec`."""

    seq_id: SequenceId
    token_id: int
    logprobs: TokenLogprobs | None = None


class Pooled(msgspec.Struct, frozen=True, array_like=True):
    """The outcome of a `Pooling`."""

    seq_id: SequenceId
    values: tuple[float, ...]


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Logprobs of a chunk's `prompt_targets`, in their order."""

    seq_id: SequenceId
    start: int
    """Position of the first of them."""
    logprobs: tuple[TokenLogprobs, ...]


class Proposal(msgspec.Struct, frozen=True, array_like=True):
    """Guesses of a draft model that the step verified for `seq_id`."""

    seq_id: SequenceId
    token_ids: tuple[int, ...]


class SequenceFailure(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that the runner could not carry on, others unharmed."""

    seq_id: SequenceId
    code: str
    """`numerical_error` for NaN or infinite activations or logits, `step_error` for an exception traced
    to the sequence, `no_token_allowed` where masks and bans leave none, `OUT_OF_MEMORY` for what is planned
    again."""
    message: str


class HostTraffic(msgspec.Struct, frozen=True, kw_only=True):
    """Copies between the pool and host memory that ended in a step."""

    ended: tuple[int, ...] = ()
    """Their transfers."""
    saved_bytes: int = 0
    loaded_bytes: int = 0
    time_s: float = 0.0
    """What the copies took, one after the other."""


NO_TRAFFIC: Final = HostTraffic()


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a step produced; every `SampleSpec` of the plan is answered by a token or a failure.

    But for void draws (`Scheduler.void_draws`), which are not made.

    A sequence with drafts is answered by one token for each draft that was confirmed and one more, in order.
    """

    step_id: int
    tokens: list[SampledToken]
    failures: list[SequenceFailure] = []
    pooled: list[Pooled] = []
    prompt_logprobs: list[PromptLogprobs] = []
    proposals: list[Proposal] = []
    """What stood in place of `UNKNOWN_DRAFT`s."""
    num_caught_up_tokens: int = 0
    """Tokens that a draft model had to read before it could guess, beyond the last step's."""
    host_traffic: HostTraffic = NO_TRAFFIC
    num_out_of_memory: int = 0
    """Allocations that failed; what came of it is in `failures`, or nothing if smaller passes went well."""
    step_time_s: float = 0.0
    ended_s: float = 0.0
    """When it was done, by `time.perf_counter` of this machine."""
