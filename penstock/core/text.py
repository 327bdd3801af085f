"""The upper waist: what every dialect asks for and what it gets back, in text.

`GenerateRequest` goes in, `TextDelta`s come out. Made by `server/dialects` (or `cli/offline`),
answered by a `ModelClient`. Domain types: wire formats are converted once, at the edge.
"""

import enum

import msgspec

from penstock.core.grammar import GRAMMAR_PARAM, GrammarSpec
from penstock.core.ids import DEFAULT_TENANT, ModelName, RequestId, TenantId
from penstock.core.params import SamplingParams


class Priority(enum.IntEnum):
    """Tier of a request; a lower tier is served only when no higher one waits."""

    REALTIME = 0
    INTERACTIVE = 1
    BATCH = 2


class FinishReason(enum.StrEnum):
    """Why an answer ended; exactly one per answer."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    """It called tools and stopped; an answer that was cut has `LENGTH` even if it has called some."""
    ERROR = "error"
    CANCELLED = "cancelled"
    CONTENT_FILTER = "content_filter"


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One turn of a conversation.

    `content` is text (parts are joined at the edge). `tool_calls` are in OpenAI's form, with
    `arguments` already parsed to an object, as chat templates expect.
    """

    role: str
    content: str | None = None
    reasoning_content: str | None = None
    """What an earlier answer thought; for templates that show it to the model again."""
    name: str | None = None
    tool_calls: tuple[dict[str, object], ...] = ()
    tool_call_id: str | None = None


class ToolMode(enum.StrEnum):
    """Whether an answer may, must or must not call tools."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"
    """At least one call of any tool."""
    NAMED = "named"
    """Exactly one call of the tool `ToolChoice.name`."""


class ToolChoice(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the client wants of `GenerateRequest.tools`."""

    mode: ToolMode = ToolMode.AUTO
    name: str = ""
    """The tool of `ToolMode.NAMED`; else empty."""


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Ask a model for text; exactly one of `prompt` and `messages` is set."""

    request_id: RequestId
    """Key of the request in this process and in the engine; no two at once may have the same."""
    client_request_id: RequestId | None = None
    """What the client calls it, in logs and answers; not unique. None: as `request_id`."""
    model: ModelName
    prompt: str | tuple[int, ...] | None = None
    """Raw text, or token ids, for completion without a chat template."""
    messages: tuple[Message, ...] | None = None
    """A conversation for the model's chat template."""
    tools: tuple[dict[str, object], ...] = ()
    """Functions in OpenAI's form, handed to the chat template; at most 128, checked by `core/tools`."""
    tool_choice: ToolChoice = ToolChoice()
    """With `ToolMode.NONE` the model does not hear of the tools."""
    parallel_tool_calls: bool = True
    """False ends the answer with its first call."""
    include_reasoning: bool = True
    """False leaves `TextDelta.reasoning` out; the tokens are billed all the same."""
    chat_template_kwargs: dict[str, object] = {}
    """More variables for the chat template, which must read them."""
    is_rendered: bool = False
    """`prompt` is a conversation that went through the chat template already; its answer is read as one."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    params: SamplingParams = SamplingParams()
    grammar: GrammarSpec | None = None
    """What the answer's text must look like; None: anything."""
    grammar_param: str = GRAMMAR_PARAM
    """The field by which the client asked for `grammar`, for errors."""
    priority: Priority = Priority.INTERACTIVE
    tenant_id: TenantId = DEFAULT_TENANT
    cache_salt: str = ""
    """Extra salt of the prefix key; requests with different salts never share blocks."""
    adapter: str = ""
    """LoRA adapter in the engine's registry, set by the catalog's client for it; empty for the base model."""
    echo: bool = False
    """Begin the answer with the prompt's text (raw prompts only)."""
    arrival_s: float = 0.0
    """Monotonic time of this process when the request was received."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token, natural logarithm, after temperature 1 softmax of raw logits."""

    token_id: int
    logprob: float
    rank: int
    """1 for the likeliest token."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """The sampled token's log-probability and the likeliest alternatives, best first."""

    sampled: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


class TextLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """`TokenLogprobs` with the tokens' own text; `token` may hold U+FFFD for a partial character."""

    token: str
    token_bytes: bytes
    logprob: float | None
    """None for the first token of an echoed prompt only."""
    top: tuple["TextLogprob", ...] = ()
    token_id: int = -1
    rank: int = 0
    """1 for the likeliest token."""
    text_offset: int = 0
    """Index in the answer's text at which the token begins, at most the text's length; a token that is not
    in the text stands where it would have been. 0 in `top`."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What the request consumed, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Of `prompt_tokens`, those found in the prefix tree."""

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


class ToolCallDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """A piece of one call: first one with `id` and `name`, then its arguments in pieces."""

    index: int
    """Which call of the answer, from 0."""
    id: str = ""
    name: str = ""
    arguments: str = ""
    """Joined over the pieces: a JSON object as text, unless the answer was cut in it."""


class TextDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A piece of an answer.

    A stream holds, for every `index` below `n`, zero or more deltas without `finish_reason` and then
    exactly one with it. The stream's last delta alone carries `usage`.
    """

    request_id: RequestId
    index: int
    text: str = ""
    reasoning: str = ""
    """What the model thinks before it answers; not part of `text`."""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    """Not part of `text`. Of a delta's parts `reasoning` comes first, then `text`, then these."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TextLogprob, ...] | None = None
    prompt_logprobs: tuple[TextLogprob | None, ...] | None = None
    """With the first delta of each answer, if they were asked for; None for the prompt's first token."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended the answer; None for end-of-sequence and length."""
    usage: Usage | None = None


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What `/v1/models` tells about one model."""

    name: ModelName
    created_unix_s: int
    max_model_len: int
    root: str = ""
    """Hub id or folder name the weights came from; never an absolute path."""
    parent: ModelName | None = None
    default_sampling: SamplingParams = SamplingParams()
    """For the fields that a client leaves out: what the model's author suggests."""
