"""Every feature of this version: what is served, what is refused, and which pairs exclude each other.

Read by `tools/compatibility` (the page) and by `tests/docs/test_compatibility` (which runs every pair). A new
feature is a row here, and a way to ask for it and to check it in `tests/docs/feature_checks`.
"""

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One served feature."""

    name: str
    """Key, and part of test ids."""
    label: str
    kind: Literal["request", "engine"]
    """Asked for by a request, or switched on when the engine starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedFeature:
    """One feature that is refused by name wherever it is asked for."""

    name: str
    """The request field, or the option of the command line and of `LLM`."""
    label: str
    kind: Literal["request", "engine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedPair:
    """Two served features that exclude each other; the message names both words."""

    first: str
    second: str
    words: tuple[str, str]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledFeature:
    """Something that is made of a prompt in place of an answer."""

    name: str
    label: str
    route: str


def _request(name: str, label: str) -> Feature:
    return Feature(name=name, label=label, kind="request")


def _engine(name: str, label: str) -> Feature:
    return Feature(name=name, label=label, kind="engine")


FEATURES: Final[tuple[Feature, ...]] = (
    _request("streaming", "streaming"),
    _request("chat", "chat template"),
    _request("continue", "continue_final_message"),
    _request("n", "n > 1"),
    _request("logprobs", "logprobs"),
    _request("prompt_logprobs", "prompt_logprobs"),
    _request("filters", "temperature, top_k, top_p, min_p"),
    _request("rare_filters", "typical_p, top_n_sigma, XTC"),
    _request("mirostat", "mirostat"),
    _request("penalties", "presence, frequency and repetition penalties"),
    _request("dry", "DRY"),
    _request("bad_words", "bad_words"),
    _request("allowed_token_ids", "allowed_token_ids"),
    _request("best_of", "best_of > n"),
    _request("beam_search", "beam search"),
    _request("logit_bias", "logit_bias"),
    _request("seed", "seed"),
    _request("stop", "stop strings"),
    _request("include_stop", "include_stop_str_in_output"),
    _request("stop_token_ids", "stop_token_ids"),
    _request("min_tokens", "min_tokens"),
    _request("eos", "end of sequence (ignore_eos off)"),
    _request("echo", "echo"),
    _request("specials", "skip_special_tokens off"),
    _request("priority", "priorities"),
    _request("cache_salt", "cache_salt"),
    _request("tools", "tool calls (tools, tool_choice auto)"),
    _request("reasoning", "reasoning_content"),
    _request("grammar", "guided decoding (response_format, structured_outputs)"),
    _request("cancel", "cancellation"),
    _engine("prefix_caching", "prefix caching"),
    _engine("chunked_prefill", "chunked prefill"),
    _engine("whole_prompts", "enable_chunked_prefill off"),
    _engine("preemption", "preemption"),
    _engine("kv_offload", "KV offload to host memory"),
    _engine("fcfs", "scheduling policy fcfs"),
    _engine("async_scheduling", "async_scheduling"),
    _engine("sliding_window", "sliding window"),
    _engine("eager_bfloat16", "kernels eager, bfloat16"),
    _engine("native_bfloat16", "kernels native, bfloat16"),
    _engine("triton", "kernels triton"),
    _engine("int8", "quantization int8"),
    _engine("int4", "quantization int4"),
    _engine("fp8", "quantization fp8"),
    _engine("gptq", "quantized checkpoint (GPTQ)"),
    _engine("gguf", "GGUF checkpoint (Q8_0)"),
    _engine("kv_int8", "kv_cache_dtype int8 (on the native kernels)"),
    _engine("kv_fp8", "kv_cache_dtype fp8"),
    _engine("deterministic", "deterministic"),
    _engine("ngram", "speculative decoding, n-gram"),
    _engine("draft_model", "speculative decoding, draft model"),
    _engine("lora", "LoRA adapters"),
    _engine("tensor_parallel", "tensor parallelism"),
)
"""Every pair of these runs, on the `reference` kernels in float32 unless the pair asks for others.

Those of the kernels triton, which tests interpret on a CPU, run in `make test-slow`.
"""

REFUSED_PAIRS: Final[tuple[RefusedPair, ...]] = (
    *(
        RefusedPair(
            first=first,
            second=second,
            words=("use_beam_search", field),
            reason="beams are ranked by the model's own probabilities",
        )
        for first, second, field in (
            ("mirostat", "beam_search", "mirostat"),
            ("penalties", "beam_search", "presence_penalty"),
            ("dry", "beam_search", "dry_multiplier"),
            ("bad_words", "beam_search", "bad_words"),
            ("allowed_token_ids", "beam_search", "allowed_token_ids"),
            ("beam_search", "logit_bias", "logit_bias"),
            ("beam_search", "min_tokens", "min_tokens"),
        )
    ),
    RefusedPair(
        first="chat",
        second="echo",
        words=("echo", "messages"),
        reason="a conversation has no prompt text to repeat",
    ),
    RefusedPair(
        first="continue",
        second="echo",
        words=("echo", "messages"),
        reason="a conversation has no prompt text to repeat",
    ),
    RefusedPair(
        first="echo",
        second="tools",
        words=("echo", "messages"),
        reason="a conversation has no prompt text to repeat",
    ),
    RefusedPair(
        first="echo",
        second="reasoning",
        words=("echo", "messages"),
        reason="a conversation has no prompt text to repeat",
    ),
    RefusedPair(
        first="beam_search",
        second="grammar",
        words=("use_beam_search", "guided decoding"),
        reason="a grammar follows one answer at a time",
    ),
    RefusedPair(
        first="chunked_prefill",
        second="whole_prompts",
        words=("max_num_batched_tokens", "enable_chunked_prefill"),
        reason="a budget below a whole context cuts prompts",
    ),
    *(
        RefusedPair(
            first=f"{first}_bfloat16",
            second=second,
            words=(first, second.removesuffix("_bfloat16")),
            reason="there is one kernel set",
        )
        for first, second in (("eager", "native_bfloat16"), ("eager", "triton"), ("native", "triton"))
    ),
    RefusedPair(
        first="eager_bfloat16",
        second="kv_int8",
        words=("eager", "kv_cache_dtype int8"),
        reason="the eager kernels keep no rounded cache",
    ),
    *(
        RefusedPair(
            first=name,
            second="kv_fp8",
            words=(name.removesuffix("_bfloat16"), "kv_cache_dtype fp8"),
            reason="these kernels keep no such cache",
        )
        for name in ("eager_bfloat16", "native_bfloat16")
    ),
    RefusedPair(
        first="kv_int8", second="kv_fp8", words=("int8", "fp8"), reason="a cache is rounded in one way"
    ),
    RefusedPair(
        first="eager_bfloat16",
        second="deterministic",
        words=("eager", "deterministic"),
        reason="its results depend on the batch",
    ),
    RefusedPair(
        first="async_scheduling",
        second="tensor_parallel",
        words=("tensor_parallel_size", "async_scheduling"),
        reason="the other ranks draw nothing, so they do not know what the step before drew",
    ),
    RefusedPair(
        first="draft_model",
        second="tensor_parallel",
        words=("tensor_parallel_size", "draft_model"),
        reason="a draft is not shared among ranks",
    ),
    RefusedPair(
        first="kv_offload",
        second="tensor_parallel",
        words=("tensor_parallel_size", "kv_offloading_size"),
        reason="blocks are not kept apart from their ranks",
    ),
    RefusedPair(
        first="lora",
        second="tensor_parallel",
        words=("tensor_parallel_size", "enable_lora"),
        reason="adapters are not shared among ranks",
    ),
    *(
        RefusedPair(
            first=first, second=second, words=(first, second), reason="weights are rounded in one way"
        )
        for first, second in (("int8", "int4"), ("int8", "fp8"), ("int4", "fp8"))
    ),
    *(
        RefusedPair(
            first=first,
            second=second,
            words=("native", "fp8"),
            reason="the native kernels have no weights in fp8",
        )
        for first, second in (("native_bfloat16", "fp8"), ("fp8", "kv_int8"))
    ),
    RefusedPair(
        first="ngram",
        second="draft_model",
        words=("ngram", "draft_model"),
        reason="one proposer makes the guesses",
    ),
    RefusedPair(
        first="sliding_window",
        second="draft_model",
        words=("full attention", "draft model"),
        reason="a draft keeps its own memory in the blocks of full attention, which are kept",
    ),
)

NOT_PAIRS: Final = frozenset({("gptq", "gguf")})
"""Formats of a checkpoint, which has one: nothing could ask for both."""

REFUSED: Final[tuple[RefusedFeature, ...]] = (
    RefusedFeature(name="reasoning_effort", label="how much to think", kind="request"),
    RefusedFeature(name="prompt_embeds", label="prompt embeddings", kind="request"),
    RefusedFeature(name="load_format", label="load_format (read from the files)", kind="engine"),
    RefusedFeature(name="pipeline_parallel_size", label="pipeline parallelism", kind="engine"),
)
"""Refused with every served feature, by name."""


POOLED: Final[tuple[PooledFeature, ...]] = (
    PooledFeature(name="mean", label="embeddings, mean", route="/v1/embeddings"),
    PooledFeature(name="last", label="embeddings, last token", route="/v1/embeddings"),
    PooledFeature(name="score", label="scores by yes and no", route="/score"),
)
"""Each runs with every engine feature. Of the request features they have those of `POOLED_FIELDS`; the fields
of the others do not exist on their routes."""

POOLED_FIELDS: Final = frozenset({"priority", "cache_salt"})


def served_pairs() -> list[tuple[Feature, Feature]]:
    """Every pair that runs, in the order of the table; a feature with itself is the feature alone."""
    refused = {(pair.first, pair.second) for pair in REFUSED_PAIRS}
    return [
        (first, second)
        for index, first in enumerate(FEATURES)
        for second in FEATURES[index:]
        if (first.name, second.name) not in refused | NOT_PAIRS
    ]


def pair_id(first: str, second: str) -> str:
    """The id of a pair's test, in the order of the table."""
    order = [feature.name for feature in FEATURES]
    low, high = sorted((first, second), key=order.index)
    return f"{low}+{high}"
