"""The upper waist for requests that generate nothing: vectors, scores and classes of texts.

Made by `server/dialects` and `cli/offline`, answered by a `ModelClient`. Each asks for one text, or one pair;
a client's request for many becomes many of these, which share the engine's steps.
"""

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from penstock.core.errors import InvalidParameterError
from penstock.core.ids import DEFAULT_TENANT, ModelName, RequestId, TenantId
from penstock.core.text import Priority, Usage

WHOLE_CONTEXT: Final = -1
"""`truncate_prompt_tokens` that stands for what the context holds."""


class PromptRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What every such request has."""

    request_id: RequestId
    """Key of the request in this process and in the engine; no two at once may have the same."""
    client_request_id: RequestId | None = None
    """What the client calls it, in logs and answers; not unique. None: as `request_id`."""
    model: ModelName
    field: str = "prompt"
    """What the client calls the text, for messages about it."""
    priority: Priority = Priority.INTERACTIVE
    tenant_id: TenantId = DEFAULT_TENANT
    cache_salt: str = ""
    """Extra salt of the prefix key; requests with different salts never share blocks."""
    adapter: str = ""
    """LoRA adapter in the engine's registry, set by the catalog's client for it; empty for the base model."""
    arrival_s: float = 0.0
    """Monotonic time of this process when the request was received."""


class EmbedRequest(PromptRequest, frozen=True, kw_only=True, omit_defaults=True):
    """Ask for the vector of a text."""

    prompt: str | tuple[int, ...]
    """Text, or token ids."""
    pooling: Literal["mean", "last"] | None = None
    """Of the hidden states after the final norm their mean, or the last one. None: as the checkpoint says."""
    dimensions: int | None = None
    """1 to the hidden size: keep the first so many numbers. None: all."""
    normalize: bool = True
    """Scale the vector to length 1, after it was cut."""
    truncate_prompt_tokens: int | None = None
    """Keep the first so many tokens, 1 to the context, -1 for all of it. None: longer prompts are refused."""
    add_special_tokens: bool = True
    """Let the tokenizer add its own tokens to a text."""


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """The vector of a text."""

    values: tuple[float, ...]
    usage: Usage


class ScoreRequest(PromptRequest, frozen=True, kw_only=True, omit_defaults=True):
    """Ask how well a document fits a query."""

    query: str
    document: str
    instruction: str | None = None
    """What the task is, for models that answer yes or no; None: web search."""


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """0 to 1, higher is better."""

    value: float
    usage: Usage


class ClassifyRequest(PromptRequest, frozen=True, kw_only=True, omit_defaults=True):
    """Ask for the classes of a text."""

    prompt: str | tuple[int, ...]
    """Text, or token ids."""


class Classification(msgspec.Struct, frozen=True, kw_only=True):
    """Probabilities by class; softmax for several classes, sigmoid for one."""

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    """One for each of `labels`, 0 to 1."""
    usage: Usage


def pairs_of_texts(text_1: Sequence[str], text_2: Sequence[str]) -> list[tuple[str, str]]:
    """One text against each of several, or as many pairs as there are texts.

    Raises:
        InvalidParameterError: the numbers do not fit.
    """
    if len(text_1) not in {1, len(text_2)}:
        raise InvalidParameterError(
            f"text_1 has {len(text_1)} texts and text_2 has {len(text_2)}, text_1 must have 1 or as many",
            param="text_1",
        )
    return list(zip([*text_1] * (len(text_2) // len(text_1)), text_2, strict=True))
