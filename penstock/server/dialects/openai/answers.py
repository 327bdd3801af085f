"""The answers' wire models, and the pieces that both endpoints build them from."""

from typing import Final, Literal

from penstock.core.errors import GenerateError
from penstock.core.text import FinishReason, TextLogprob, Usage
from penstock.server.validation import AnswerModel

_LOGPROB_MIN: Final = -9999.0
"""JSON has no minus infinity."""

Finish = Literal["stop", "length", "tool_calls", "content_filter"]

_FINISH: Final[dict[FinishReason, Finish]] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TOOL_CALLS: "tool_calls",
    FinishReason.CONTENT_FILTER: "content_filter",
}


class PromptTokensDetails(AnswerModel):
    """Of the prompt's tokens, those that did not have to be computed."""

    cached_tokens: int


class UsageAnswer(AnswerModel):
    """Tokens consumed."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(AnswerModel):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(AnswerModel):
    """Log-probabilities, chat style."""

    content: list[TokenLogprob]
    refusal: None = None


class PromptLogprob(AnswerModel):
    """What is known of a token that stands, or could have stood, in the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptToken = dict[str, PromptLogprob]
"""Token id to what is known: the token that stands there first, then the likeliest."""


class CompletionLogprobs(AnswerModel):
    """Log-probabilities, completions style: four lists of equal length."""

    text_offset: list[int]
    tokens: list[str]
    token_logprobs: list[float | None]
    """None for the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None]


def finish_word(reason: FinishReason) -> Finish:
    """OpenAI's word for a finish reason.

    Raises:
        GenerateError: the answer did not end by itself, so it has no such word.
    """
    word = _FINISH.get(reason)
    if word is not None:
        return word
    raise GenerateError(f"the answer ended with {reason}", code=str(reason))


def usage_answer(usages: list[Usage]) -> UsageAnswer:
    """Sum over the prompts of a request."""
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    return UsageAnswer(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(usage.cached_tokens for usage in usages)),
    )


def _finite(logprob: float | None) -> float:
    assert logprob is not None, "only an echoed prompt has a token without logprob"
    return max(logprob, _LOGPROB_MIN)


def _top(item: TextLogprob) -> TopLogprob:
    return TopLogprob(token=item.token, logprob=_finite(item.logprob), bytes=list(item.token_bytes))


def chat_logprobs(items: tuple[TextLogprob, ...]) -> ChatLogprobs:
    """Chat style."""
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=item.token,
                logprob=_finite(item.logprob),
                bytes=list(item.token_bytes),
                top_logprobs=[_top(each) for each in item.top],
            )
            for item in items
        ]
    )


def completion_logprobs(items: tuple[TextLogprob, ...]) -> CompletionLogprobs:
    """Completions style."""
    return CompletionLogprobs(
        text_offset=[item.text_offset for item in items],
        tokens=[item.token for item in items],
        token_logprobs=[None if item.logprob is None else _finite(item.logprob) for item in items],
        top_logprobs=[
            None if item.logprob is None else {each.token: _finite(each.logprob) for each in item.top}
            for item in items
        ],
    )


def prompt_logprobs(items: tuple[TextLogprob | None, ...] | None) -> list[PromptToken | None] | None:
    """One entry a prompt token, as vLLM has them: token ids to what is known of each."""
    if items is None:
        return None
    return [None if item is None else _prompt_token(item) for item in items]


def _prompt_token(item: TextLogprob) -> PromptToken:
    return {
        str(each.token_id): PromptLogprob(
            logprob=_finite(each.logprob), rank=each.rank, decoded_token=each.token
        )
        for each in (item, *item.top)
    }
