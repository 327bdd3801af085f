"""What `LLM.generate` returns, with the names that vLLM's users know."""

from dataclasses import dataclass, field

from penstock.core.text import TextDelta, TextLogprob
from penstock.core.tools import CalledTool, add_calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """One token's log-probability."""

    logprob: float
    rank: int
    """1 for the likeliest token."""
    decoded_token: str


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One answer; filled while its deltas come, then left alone."""

    index: int
    text: str = ""
    reasoning_content: str = ""
    """What was thought before; of conversations alone."""
    tool_calls: list[CalledTool] = field(default_factory=list)
    """Calls of `tools`, each with `id`, `name` and `arguments` as JSON text."""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    """Sum over the tokens; None unless `logprobs` was asked for."""
    logprobs: list[dict[int, Logprob]] | None = None
    """For each token its own entry and the likeliest ones; None unless asked for."""
    finish_reason: str | None = None
    """`stop`, `length`, `tool_calls`, or `error`."""
    stop_reason: int | str | None = None

    def add(self, delta: TextDelta) -> None:
        """Append what a delta brings."""
        self.text += delta.text
        self.reasoning_content += delta.reasoning
        add_calls(self.tool_calls, delta.tool_calls)
        self.token_ids.extend(delta.token_ids)
        for entry in delta.logprobs or ():
            self._add_logprob(entry)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason.value
            self.stop_reason = delta.stop_reason

    def _add_logprob(self, sampled: TextLogprob) -> None:
        entries = _logprobs(sampled)
        if self.logprobs is None:
            self.logprobs = []
        self.logprobs.append(entries)
        assert sampled.logprob is not None, "only an echoed prompt has a token without logprob"
        self.cumulative_logprob = (self.cumulative_logprob or 0.0) + sampled.logprob


def _logprobs(entry: TextLogprob) -> dict[int, Logprob]:
    return {one.token_id: _logprob(one) for one in (entry, *entry.top)}


def _logprob(entry: TextLogprob) -> Logprob:
    assert entry.logprob is not None, "only an echoed prompt has a token without logprob"
    return Logprob(logprob=entry.logprob, rank=entry.rank, decoded_token=entry.token)


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """All answers to one prompt."""

    request_id: str
    prompt: str | None
    """The text, rendered for conversations; None if token ids were given."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """For each prompt token its own entry and the likeliest ones, None for the first; as asked for."""
    num_cached_tokens: int = 0
    error: str | None = None
    """Why this request failed while others went on; None if it did not."""

    def add(self, delta: TextDelta) -> None:
        """Take in a delta of one of the answers."""
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = [
                None if each is None else _logprobs(each) for each in delta.prompt_logprobs
            ]
        self.outputs[delta.index].add(delta)

    @property
    def finished(self) -> bool:
        """Always true here: `generate` returns whole answers."""
        return all(output.finish_reason is not None for output in self.outputs)

    def fail(self, reason: str) -> None:
        """End what has not ended, with `error`."""
        self.error = reason
        for output in self.outputs:
            output.finish_reason = output.finish_reason or "error"
