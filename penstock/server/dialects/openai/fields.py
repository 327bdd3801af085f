"""The request fields that chat completions and completions share, and their way into `SamplingParams`.

Two tables here decide about everything else that clients are known to send: `REFUSED` names what is not
there yet, with the values that ask for nothing and may therefore pass.
"""

from typing import Annotated, Final, Literal

from msgspec.structs import replace
from pydantic import Field

from penstock.core.errors import InvalidParameterError
from penstock.core.params import (
    INT64_MAX,
    INT64_MIN,
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_DRY_BREAKERS,
    MAX_LOGIT_BIAS,
    MAX_N,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_LOGPROBS,
    SamplingParams,
    validate_sampling,
)
from penstock.core.text import GenerateRequest
from penstock.server.dialects.openai.asked import MAX_LABEL_CHARS, AskedFields, asked_model, call_fields
from penstock.server.dialects.openai.guided import GuidedFields, grammar_of
from penstock.server.services import Call
from penstock.server.validation import WHOLE, Flag, Number, Text, WireModel

MAX_METADATA: Final = 16
_NOTHING: Final = (None,)

REFUSED: Final[dict[str, tuple[object, ...]]] = {
    "audio": _NOTHING,
    "chat_template": _NOTHING,
    "documents": (None, []),
    "extra_args": (None, {}),
    "function_call": (None, "none"),
    "functions": (None, []),
    "kv_transfer_params": _NOTHING,
    "logits_processors": (None, []),
    "mm_processor_kwargs": _NOTHING,
    "modalities": (None, ["text"]),
    "moderation": _NOTHING,
    "prediction": _NOTHING,
    "prompt_cache_options": _NOTHING,
    "prompt_cache_retention": _NOTHING,
    "prompt_embeds": _NOTHING,
    "reasoning_effort": _NOTHING,
    "spaces_between_special_tokens": (None, True),
    "store": (None, False),
    "suffix": (None, ""),
    "truncate_prompt_tokens": _NOTHING,
    "verbosity": _NOTHING,
    "vllm_xargs": (None, {}),
    "web_search_options": _NOTHING,
}
"""Fields that clients send and that are not served yet, with the values that ask for nothing."""


def is_neutral(value: object, *, allowed: tuple[object, ...]) -> bool:
    """True if the value asks for nothing; `1` is not `True` here."""
    return any(type(value) is type(each) and value == each for each in allowed)


def refuse_by_name(data: object) -> object:
    """Drop fields of `REFUSED` that ask for nothing.

    Raises:
        InvalidParameterError: a field asks for something that is not there yet.
    """
    if not isinstance(data, dict):
        return data
    kept: dict[object, object] = {}
    for name, value in data.items():
        if name not in REFUSED:
            kept[name] = value
        elif not is_neutral(value, allowed=REFUSED[name]):
            raise InvalidParameterError(
                f"{name} is not supported by this version; leave it out",
                code="unsupported_parameter",
                param=name,
            )
    return kept


class StreamOptions(WireModel):
    """How to stream."""

    include_usage: Flag | None = Field(
        default=None, description="Send one more chunk before [DONE], without choices, that holds the usage."
    )
    include_obfuscation: Literal[False] | None = Field(
        default=None, description="Only false: chunks are never padded."
    )


StopText = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]
BadWord = Annotated[Text, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
TokenId = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]


class SamplingFields(AskedFields, GuidedFields):
    """Fields with the same meaning on both endpoints; null is the same as absent everywhere."""

    n: Annotated[int, Field(strict=True, ge=1, le=MAX_N), WHOLE] | None = Field(
        default=None, description="Answers."
    )
    best_of: Annotated[int, Field(strict=True, ge=1, le=MAX_N), WHOLE] | None = Field(
        default=None,
        description="At least n: so many answers are made and billed, and the n likeliest given. More than n "
        "only without stream.",
    )
    use_beam_search: Flag | None = Field(
        default=None,
        description="Look for the likeliest answers, with best_of (or n) beams; nothing is drawn.",
    )
    length_penalty: Annotated[Number, Field(ge=-10, le=10)] | None = Field(
        default=None, description="Beams only: above 1 favours longer answers."
    )
    early_stopping: Flag | Literal["never"] | None = Field(
        default=None, description="Beams only: true stops at as many answers as there are beams."
    )
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(strict=True, ge=-1, le=INT64_MAX), WHOLE] | None = Field(
        default=None, description="0 and -1 keep all tokens."
    )
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=10)] | None = None
    typical_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_n_sigma: Annotated[Number, Field(ge=-1, le=100)] | None = Field(
        default=None, description="0 and -1 keep all tokens."
    )
    xtc_probability: Annotated[Number, Field(ge=0, le=1)] | None = None
    xtc_threshold: Annotated[Number, Field(ge=0, le=1)] | None = None
    dry_multiplier: Annotated[Number, Field(ge=0, le=100)] | None = None
    dry_base: Annotated[Number, Field(ge=1, le=8)] | None = None
    dry_allowed_length: Annotated[int, Field(strict=True, ge=1, le=4096), WHOLE] | None = None
    dry_penalty_last_n: Annotated[int, Field(strict=True, ge=-1, le=INT64_MAX), WHOLE] | None = Field(
        default=None, description="-1 is the whole context."
    )
    dry_sequence_breakers: (
        Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_DRY_BREAKERS)] | None
    ) = None
    mirostat: Annotated[int, Field(strict=True, ge=0, le=2), WHOLE] | None = None
    mirostat_tau: Annotated[Number, Field(ge=0, le=100)] | None = None
    mirostat_eta: Annotated[Number, Field(ge=0, le=1)] | None = None
    bad_words: Annotated[list[BadWord], Field(fail_fast=True, max_length=MAX_BAD_WORDS)] | None = None
    allowed_token_ids: (
        Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS)] | None
    ) = Field(default=None, description="No other token can come, the end of sequence neither.")
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")],
                Annotated[Number, Field(ge=-100, le=100)],
            ],
            Field(max_length=MAX_LOGIT_BIAS),
        ]
        | None
    ) = Field(default=None, description="Token id, as a string of digits, to a bias.")
    seed: Annotated[int, Field(strict=True, ge=INT64_MIN, le=INT64_MAX), WHOLE] | None = Field(
        default=None,
        description="The draws depend on the seed alone. With --kernels reference --dtype float32 the same "
        "seed gives the same answer whatever else the server does; with faster kernels rounding may differ "
        "with the batch.",
    )
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)] | None = (
        None
    )
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)] | None = (
        None
    )
    include_stop_str_in_output: Flag | None = None
    skip_special_tokens: Flag | None = None
    min_tokens: Annotated[int, Field(strict=True, ge=0, le=INT64_MAX), WHOLE] | None = None
    ignore_eos: Flag | None = None
    prompt_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS), WHOLE] | None = Field(
        default=None,
        description="Log-probability of each prompt token, with so many alternatives; not with stream.",
    )
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    service_tier: Literal["auto", "default"] | None = Field(
        default=None, description="There is one tier; both words mean it."
    )
    safety_identifier: Annotated[Text, Field(max_length=MAX_LABEL_CHARS)] | None = Field(
        default=None, description="A label for the client's own use: neither stored nor logged."
    )
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=64)],
                Annotated[Text, Field(max_length=MAX_LABEL_CHARS)],
            ],
            Field(max_length=MAX_METADATA),
        ]
        | None
    ) = Field(default=None, description="Labels for the client's own use: neither stored nor logged.")
    prompt_cache_key: Annotated[Text, Field(max_length=MAX_LABEL_CHARS)] | None = Field(
        default=None, description="Not needed: shared prompts are found by their content."
    )

    @property
    def include_usage(self) -> bool:
        """True if the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage is True


_SAME_NAME: Final = (
    "n",
    "best_of",
    "use_beam_search",
    "length_penalty",
    "early_stopping",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "xtc_probability",
    "xtc_threshold",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_penalty_last_n",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "prompt_logprobs",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "min_tokens",
    "ignore_eos",
)
_LISTS: Final = ("dry_sequence_breakers", "bad_words", "allowed_token_ids")


def _check_combinations(fields: SamplingFields) -> None:
    if fields.stream_options is not None and fields.stream is not True:
        raise InvalidParameterError("stream_options needs stream to be true", param="stream_options")
    if fields.prompt_logprobs is not None and fields.stream is True:
        raise InvalidParameterError(
            "prompt_logprobs cannot be used with stream: they belong to no piece of the answer",
            param="prompt_logprobs",
        )
    n, best_of = fields.n or 1, fields.best_of
    if best_of is not None and best_of < n:
        raise InvalidParameterError(
            f"best_of is {best_of}, it must be at least n, which is {n}", param="best_of"
        )
    if best_of is not None and best_of > n and fields.stream is True and not fields.use_beam_search:
        raise InvalidParameterError(
            f"best_of is {best_of}, with stream it must equal n, which is {n}: the best is known at the end",
            param="best_of",
        )


def sampling_params(
    fields: SamplingFields,
    *,
    defaults: SamplingParams,
    max_tokens: int | None,
    logprobs: int | None,
    allow_zero_max_tokens: bool = False,
) -> SamplingParams:
    """Sampling parameters of a request, checked by the same function as at every other door.

    Args:
        fields: of the body; absent ones take the model's `defaults`.
        defaults: `ModelCard.default_sampling`.
        max_tokens: as the endpoint defines it.
        logprobs: as the endpoint defines it.
        allow_zero_max_tokens: with `echo`.

    Raises:
        InvalidParameterError: fields that contradict each other or are out of range.
    """
    _check_combinations(fields)
    known = {name: value for name in _SAME_NAME if (value := getattr(fields, name)) is not None}
    known |= {name: tuple(value) for name in _LISTS if (value := getattr(fields, name)) is not None}
    if fields.top_n_sigma is not None:
        known["top_n_sigma"] = max(0.0, fields.top_n_sigma)
    stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
    params = replace(
        defaults,
        **known,
        stop=stop,
        stop_token_ids=tuple(fields.stop_token_ids or ()),
        logit_bias={int(token_id): bias for token_id, bias in (fields.logit_bias or {}).items()},
        max_tokens=max_tokens,
        logprobs=logprobs,
    )
    validate_sampling(params, allow_zero_max_tokens=allow_zero_max_tokens)
    return params


def default_sampling(fields: SamplingFields, *, call: Call) -> SamplingParams:
    """What the model that `fields` names suggests.

    Raises:
        NotFoundError: no such model.
    """
    return asked_model(fields, call=call).client.card.default_sampling


def base_request(fields: SamplingFields, *, call: Call, params: SamplingParams) -> GenerateRequest:
    """The request without its prompt; the answer bears the name that the client asked by.

    Raises:
        NotFoundError: no such model.
        InvalidParameterError: the grammar is malformed, or there are two.
    """
    model = asked_model(fields, call=call).name
    asked = grammar_of(fields)
    return GenerateRequest(
        **call_fields(fields, model=model, call=call),
        params=params,
        grammar=asked.spec,
        grammar_param=asked.param,
    )


TopLogprobs = Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS), WHOLE]
"""How many likelier tokens to tell beside the one that came."""
