"""Options that people know from vLLM and that this version does not have: refused by name, never ignored."""

from collections.abc import Sequence
from typing import Final, NoReturn

from penstock.core.errors import StartupError

_ONE_RANK: Final = "ranks share layers (--tensor-parallel-size) and nothing else"
_WHOLE_WEIGHTS: Final = "weights lie whole where the model computes; --quantization makes them smaller"
_SPEC: Final = "write it into --speculative-config"
_NO_GUIDED: Final = "llguidance is the one backend, and its limits are fixed"

REFUSED_OPTIONS: Final[dict[str, str]] = {
    "q": "write --quantization",
    "load_format": "the format of the weights is read from the files",
    "swap_space": "write --kv-offloading-size: preempted sequences and cached prefixes share that memory",
    "kv_offloading_backend": "there is one: host memory; write --kv-offloading-size",
    "cpu_offload_gb": _WHOLE_WEIGHTS,
    "pipeline_parallel_size": _ONE_RANK,
    "data_parallel_size": _ONE_RANK,
    "enable_expert_parallel": _ONE_RANK,
    "distributed_executor_backend": _ONE_RANK,
    "enable_lora_bias": "adapters with biases are not supported",
    "lora_extra_vocab_size": "adapters that add tokens are not supported",
    "fully_sharded_loras": _ONE_RANK,
    "speculative_model": _SPEC,
    "num_speculative_tokens": _SPEC,
    "guided_decoding_backend": _NO_GUIDED,
    "structured_outputs_config": _NO_GUIDED,
    "tool_parser_plugin": "code from outside is never run; see the list of --tool-call-parser",
    "reasoning_config": "write --reasoning-parser tags with --reasoning-start-str and --reasoning-end-str",
    "trust_remote_code": "code from model folders is never run; see the list of known architectures",
    "task": "text, vectors and scores are served by the same server; see the guide on embeddings",
    "runner": "text, vectors and scores are served by the same server; see the guide on embeddings",
    "override_pooler_config": "write pooling_type in the request",
    "pooler_config": "write pooling_type in the request",
    "tokenizer": "the tokenizer comes with the model",
    "hf_token": "set HF_TOKEN in the environment",
    "ssl_keyfile": "put a TLS proxy in front",
    "ssl_certfile": "put a TLS proxy in front",
}


def refuse(name: str, *, source: str) -> NoReturn:
    """Raise for the refused option `name`.

    Raises:
        StartupError: always.
    """
    where = "" if source == "flags" else f" (from {source})"
    raise StartupError(f"{name} is not supported{where}: {REFUSED_OPTIONS[name]}", param=name)


def refuse_name(name: str, *, source: str) -> None:
    """Raise if `name` (with underscores) is an option that this version refuses."""
    if name in REFUSED_OPTIONS:
        refuse(name, source=source)


def refuse_flags(argv: Sequence[str]) -> None:
    """Raise if a flag of `argv` is one that this version refuses.

    Raises:
        StartupError: names the option and what to do instead.
    """
    for token in argv:
        if token == "--":  # noqa: S105 - the end of the flags, not a secret
            return
        if token.startswith("-"):
            refuse_name(token.lstrip("-").split("=", 1)[0].replace("-", "_"), source="flags")
