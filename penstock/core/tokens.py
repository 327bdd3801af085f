"""The lower waist: token ids in, token ids out.

`EngineRequest` goes to an `EngineClient`, `TokenDelta`s come back. These structs also are the format
between the API process and the engine process (msgpack, array-like where they are many).
"""

import msgspec

from penstock.core.grammar import GrammarSpec
from penstock.core.ids import DEFAULT_TENANT, RequestId, TenantId
from penstock.core.params import SamplingParams
from penstock.core.text import FinishReason, Priority, TokenLogprobs


class Pooling(msgspec.Struct, frozen=True, array_like=True):
    """What a sequence that generates nothing gives instead of tokens, once its last token is computed."""

    kind: str
    """`mean` or `last` (a vector of hidden size), `classify` (the checkpoint's own head) or `logits` (of
    `token_ids` at the last token)."""
    token_ids: tuple[int, ...] = ()


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Ask the engine for tokens; everything that concerns text has been resolved.

    `params.max_tokens` is concrete here: the text service has replaced None by what the context holds.
    """

    request_id: RequestId
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer unless `params.ignore_eos`."""
    priority: Priority = Priority.INTERACTIVE
    tenant_id: TenantId = DEFAULT_TENANT
    cache_salt: str = ""
    grammar: GrammarSpec | None = None
    """Constrains the tokens; the engine compiles it before it accepts the request."""
    adapter_revision: str = ""
    """Content hash of the adapter, part of the prefix key; empty for the base model."""
    banned_sequences: tuple[tuple[int, ...], ...] = ()
    """`params.bad_words` as token ids: their last token may not follow the others."""
    dry_breaker_ids: tuple[int, ...] = ()
    """Tokens that hold one of `params.dry_sequence_breakers`; empty unless `dry_multiplier` is set."""
    adapter: str = ""
    """Name of the LoRA adapter in the engine's registry; empty for the base model."""
    pooling: Pooling | None = None
    """Asks for a vector or scores instead of tokens; `max_tokens` is then 0."""

    @property
    def max_tokens(self) -> int:
        """`params.max_tokens`, known to be concrete."""
        assert self.params.max_tokens is not None
        return self.params.max_tokens

    @property
    def num_tokens_max(self) -> int:
        """Most tokens that all answers and the prompt can hold together, sharing not counted."""
        return self.params.num_sequences * (len(self.prompt_token_ids) + self.max_tokens)


class RequestStats(msgspec.Struct, frozen=True, array_like=True):
    """What the engine knows about a request when it ends; seconds by the engine's monotonic clock."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    queue_wait_s: float
    """From arrival in the engine to its first scheduled step."""
    batch_size: int
    """Sequences in the step in which it was first scheduled."""
    kv_usage: float
    """Owned blocks over all blocks, 0 to 1, in that step."""
    num_preemptions: int
    inference_s: float = 0.0
    """From the first scheduled step to the end."""


class ErrorInfo(msgspec.Struct, frozen=True, array_like=True):
    """A `PenstockError` on the wire between processes."""

    kind: str
    """Class name in `core.errors`."""
    message: str
    code: str
    param: str | None = None
    retry_after_s: float | None = None


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """Tokens that one answer gained in one step.

    For every `index` below `n` exactly one delta has a `finish_reason`; or the request fails as a whole
    and a single delta with `error` is its last. The request's last delta alone carries `stats`.
    """

    request_id: RequestId
    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The id in `params.stop_token_ids` that ended the answer; not among `token_ids`."""
    num_cached_tokens: int = 0
    stats: RequestStats | None = None
    error: ErrorInfo | None = None
    stats_so_far: RequestStats | None = None
    """With the request's first token: what is known should the client end it early."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """With the first delta of answer 0, if asked for; one entry a prompt token, None for the first."""
    pooled: tuple[float, ...] | None = None
    """With the only delta of a request that asked for `pooling`."""

    @property
    def is_last(self) -> bool:
        """True for the request's terminal event."""
        return self.stats is not None or self.error is not None


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """Plain numbers of one engine step; counters are for this step alone, gauges are after it."""

    step_time_s: float
    host_time_s: float = 0.0
    """Before it nothing was computed for so long though there was work: the host did its part."""
    num_seqs: int
    num_batched_tokens: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_forced_tokens: int = 0
    """Of `num_generated_tokens`, those that a grammar forced: they were not drawn."""
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int
    num_preemptions: int
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_blocks: int
    num_blocks_free: int
    num_blocks_cached: int
    num_blocks_owned: int
    num_slots_owned: int
    """Token slots in owned blocks, shared blocks counted once."""
    num_slots_used: int
    """Of those, slots that hold a token."""
    num_out_of_memory: int = 0
    """Allocations that failed in the step."""
    num_offload_hit_tokens: int = 0
    """Tokens whose KV came back from host memory."""
    offload_saved_bytes: int = 0
    """Copied from the pool to host memory."""
    offload_loaded_bytes: int = 0
    """Copied from host memory to the pool."""
    offload_time_s: float = 0.0
    """What these copies took."""
    offload_used_bytes: int = 0
    """Host memory that holds blocks."""
    num_adapters_running: int = 0
    """Different LoRA adapters of running requests."""
    num_adapters_waiting: int = 0
    """Different LoRA adapters of which no request runs, but some wait."""
    num_drafts: int = 0
    """Sequences whose guesses were verified."""
    num_draft_tokens: int = 0
    """Guesses that were verified."""
    num_accepted_tokens: tuple[int, ...] = ()
    """Guesses that stood, by their place in a draft."""


class AdapterReport(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter of an engine, as `/admin/adapters` lists it."""

    name: str
    revision: str
    """Hash of its files."""
    rank: int
    """The largest of its ranks; 0 if it has not been read since the engine's restart."""
    num_bytes: int
    """Of its matrices in memory; as `rank`."""
    is_in_memory: bool
    num_requests: int
    """Running or waiting."""
    path: str
    """Folder it was read from; never told to clients."""
    allow_links: bool = False
    """Its files may be symbolic links."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a started engine is: the resolved choices, for the start table, `/metrics` and admission."""

    architecture: str
    num_parameters: int
    dtype: str
    kernels: str
    kernels_detail: str = ""
    """Instruction set and threads, where the kernels have their own."""
    execution: str = "op by op"
    """How passes of the model run: `recorded`, or `op by op` and why."""
    quantization: str = "none"
    kv_cache_dtype: str = ""
    num_threads: int = 1
    deterministic: bool = False
    device: str
    """As torch calls it: `cpu`, `cuda:0`."""
    device_detail: str = ""
    """The chip, and why this device was chosen."""
    vocab_size: int
    hidden_size: int = 0
    """Numbers in a vector of `Pooling`."""
    labels: tuple[str, ...] = ()
    """Classes of a sequence classification head; empty for a model that generates."""
    weights_bytes: int
    kv_bytes: int
    bytes_per_block: int
    kv_offload_bytes: int = 0
    """Host memory for blocks beyond the pool."""
    device_bytes: int = 0
    """Memory of a device with its own; 0 on the CPU."""
    activation_bytes: int = 0
    """What the heaviest step takes on it beside weights and KV, measured at start."""
    graph_bytes: int = 0
    """Set aside on it for recorded steps."""
    block_size: int
    num_blocks: int
    num_cache_groups: int
    cache_group_windows: tuple[int | None, ...] = ()
    """Window of each cache group, None for full attention; empty means all full."""
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_lora: bool = False
    adapters: tuple[AdapterReport, ...] = ()
    """Loaded at start."""
    load_time_s: float
    warmup_time_s: float
    speculation: str = "none"
    async_scheduling: bool = False
    """Each step is planned and launched before the outcome of the one before it is known."""
    """Who guesses tokens ahead, in words."""


class MemoryReport(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds which bytes in the engine process."""

    weights_bytes: int
    kv_bytes_total: int
    kv_bytes_free: int
    kv_bytes_cached: int
    kv_bytes_owned: int
    prefix_tree_nodes: int
    prefix_tree_bytes: int
    buffer_bytes: int
    """Inputs, activations of the CPU's kernels, sampling states, masks, grammars."""
    offload_bytes_total: int = 0
    """Host memory for blocks beyond the pool."""
    offload_bytes_used: int = 0
    """Of that, what holds blocks."""
    activation_bytes: int = 0
    """Kept free on a device for the heaviest step, as measured at start; 0 on the CPU."""
    graph_bytes: int = 0
    """Kept for recorded steps on a device; 0 on the CPU."""
    device_bytes_total: int = 0
    """What the device has; 0 on the CPU."""
    device_bytes_used: int = 0
    """What is taken of it now, by other processes too."""
    process_rss_bytes: int


class RequestReport(msgspec.Struct, frozen=True, kw_only=True):
    """One request in the engine, as `/admin/requests` lists it; never its text."""

    request_id: RequestId
    tenant_id: TenantId
    priority: int
    state: str
    num_prompt_tokens: int
    num_computed_tokens: int
    num_generated_tokens: int
    num_blocks: int
    num_preemptions: int
    age_s: float
