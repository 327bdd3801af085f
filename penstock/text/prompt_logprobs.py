"""The logprobs of a prompt's own tokens, as text: once per request, with its echo if that is asked for.

Made by `service` for requests that ask; `stream` hands it what the engine tells and sends out what it makes.
"""

from collections.abc import Sequence

from penstock.core.text import GenerateRequest, TextDelta, TextLogprob, TokenLogprob, TokenLogprobs
from penstock.text.detokenizer import Detokenizer
from penstock.text.tokenizer import Tokenizer


def text_logprob(
    tokenizer: Tokenizer, logprob: TokenLogprob, *, top: tuple[TextLogprob, ...] = (), offset: int = 0
) -> TextLogprob:
    """One entry with the token's own text."""
    spelled = tokenizer.token_bytes(logprob.token_id)
    return TextLogprob(
        token=spelled.decode("utf-8", "replace"),
        token_bytes=spelled,
        logprob=logprob.logprob,
        top=top,
        token_id=logprob.token_id,
        rank=logprob.rank,
        text_offset=offset,
    )


class PromptReader:
    """Turns the prompt's `TokenLogprobs` into the deltas that open a request's stream."""

    def __init__(
        self, tokenizer: Tokenizer, request: GenerateRequest, *, token_ids: Sequence[int], echo: str | None
    ) -> None:
        """Keep what is needed for one request.

        Args:
            tokenizer: the model's.
            request: asks for `prompt_logprobs`, or for `logprobs` of an echoed prompt, or both.
            token_ids: the prompt.
            echo: the prompt's text, None if it is not repeated.
        """
        self._tokenizer = tokenizer
        self._request = request
        self._token_ids = token_ids
        self._echo = echo

    def deltas(self, told: Sequence[TokenLogprobs | None]) -> list[TextDelta]:
        """For each answer its opening delta.

        Args:
            told: one entry a prompt token, None for the first.
        """
        params = self._request.params
        prompt = echoed = None
        if params.prompt_logprobs is not None:
            entries = self._entries(told, num_top=params.prompt_logprobs)
            prompt = (None, *entries[1:])
        if self._echo is not None and params.logprobs is not None:
            echoed = self._entries(told, num_top=params.logprobs)
        return [
            TextDelta(
                request_id=self._request.request_id,
                index=index,
                text=self._echo or "",
                logprobs=echoed,
                prompt_logprobs=prompt,
            )
            for index in range(params.n)
        ]

    def _entries(self, told: Sequence[TokenLogprobs | None], *, num_top: int) -> tuple[TextLogprob, ...]:
        offsets = self._offsets()
        return tuple(
            self._first(offset) if each is None else self._entry(each, num_top=num_top, offset=offset)
            for each, offset in zip(told, offsets, strict=True)
        )

    def _first(self, offset: int) -> TextLogprob:
        """The first token follows nothing, so it has no probability."""
        spelled = self._tokenizer.token_bytes(self._token_ids[0])
        return TextLogprob(
            token=spelled.decode("utf-8", "replace"),
            token_bytes=spelled,
            logprob=None,
            token_id=self._token_ids[0],
            text_offset=offset,
        )

    def _entry(self, told: TokenLogprobs, *, num_top: int, offset: int) -> TextLogprob:
        top = tuple(text_logprob(self._tokenizer, each) for each in told.top[:num_top])
        return text_logprob(self._tokenizer, told.sampled, top=top, offset=offset)

    def _offsets(self) -> list[int]:
        """Where each token begins in the prompt's text."""
        skip = self._request.params.skip_special_tokens
        detokenizer = Detokenizer(self._tokenizer, skip_special_tokens=skip, at_start=True)
        offsets, num_chars = [], 0
        for token_id in self._token_ids:
            offsets.append(num_chars)
            num_chars += len(detokenizer.push(token_id))
        return offsets
