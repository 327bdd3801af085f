"""One answer of a request: `TokenDelta`s in, `TextDelta`s out.

Joins the detokenizer, the stop-string search, the reading for thoughts and tool calls and the text of
logprobs, and decides how the answer ends. Knows nothing of the engine's stream, of other answers or of usage
(`stream`).
"""

from msgspec.structs import replace

from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.text import FinishReason, TextDelta, TextLogprob, TokenLogprobs
from penstock.core.tokens import TokenDelta
from penstock.text.answer_reader import AnswerReader, Shown
from penstock.text.detokenizer import Detokenizer
from penstock.text.prompt_logprobs import text_logprob
from penstock.text.stop_strings import StopAutomaton, StopSearch
from penstock.text.tokenizer import Tokenizer


class Answer:
    """State of one answer; `finish_reason` is None until it has ended.

    Tokens whose text is held back (an unfinished character, a possible stop string or tool call) wait and go
    out with the next text. Tokens after the one that completes a stop string, or the only tool call that is
    wanted, are dropped and not counted.
    """

    __slots__ = (
        "_detokenizer",
        "_index",
        "_min_tokens",
        "_num_chars",
        "_num_shown",
        "_offsets",
        "_reader",
        "_request_id",
        "_stops",
        "_tokenizer",
        "_waiting_ids",
        "_waiting_logprobs",
        "finish_reason",
        "num_tokens",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        request_id: RequestId,
        index: int,
        params: SamplingParams,
        automaton: StopAutomaton | None,
        at_start: bool,
        reader: AnswerReader | None = None,
        kept_ids: frozenset[int] = frozenset(),
        num_chars_before: int = 0,
    ) -> None:
        """Begin answer `index`.

        Args:
            tokenizer: whose tokens will come.
            request_id: for the deltas.
            index: of this answer.
            params: of the request.
            automaton: None if the request has no stop strings.
            at_start: False if visible text came before.
            reader: divides the text into its parts; None if all of it is the answer.
            kept_ids: special tokens that `reader` must see.
            num_chars_before: length of the echoed prompt, after which the answer's offsets go on.
        """
        self._tokenizer = tokenizer
        self._request_id = request_id
        self._index = index
        self._min_tokens = params.min_tokens
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            at_start=at_start,
            kept_ids=kept_ids,
        )
        self._reader = reader
        keep = params.include_stop_str_in_output
        self._stops = None if automaton is None else StopSearch(automaton, include_stop_str_in_output=keep)
        # Lists, since a model may produce thousands of tokens without any text.
        self._waiting_ids: list[int] = []
        self._waiting_logprobs: list[TextLogprob] = []
        self._offsets: list[int] | None = None if params.logprobs is None else []
        """Where the tokens being read begin in the text."""
        self._num_chars = num_chars_before
        """Length of the text so far, with what is held back."""
        self._num_shown = num_chars_before
        self.num_tokens = 0
        """Tokens taken so far: what is billed."""
        self.finish_reason: FinishReason | None = None

    def push(self, delta: TokenDelta) -> TextDelta | None:
        """Take tokens; return what can be shown, or None if that is nothing yet.

        After the answer has ended its further tokens are ignored.
        """
        if self.finish_reason is not None:
            return None
        shown, num_taken = self._read(delta.token_ids)
        self._waiting_ids.extend(delta.token_ids[:num_taken])
        if delta.logprobs is not None:
            self._waiting_logprobs.extend(
                map(self._logprob, delta.logprobs[:num_taken], self._taken_offsets())
            )
        if not self._is_cut and delta.finish_reason is None:
            return self._delta(shown) if shown else None
        return self._last_delta(shown, delta=delta)

    def end(self, reason: FinishReason) -> TextDelta:
        """End the answer from outside; shows what was held back."""
        assert self.finish_reason is None
        self.finish_reason = reason
        return self._delta(self._flush(Shown()))

    @property
    def _matched(self) -> str | None:
        return None if self._stops is None else self._stops.matched

    @property
    def _is_cut(self) -> bool:
        """Whether the text itself has ended the answer."""
        return self._matched is not None or (self._reader is not None and self._reader.is_ended)

    def _read(self, token_ids: tuple[int, ...]) -> tuple[Shown, int]:
        """What `token_ids` show up to the end of the answer, and how many tokens that took."""
        push = self._push if self._offsets is not None else self._detokenizer.push
        if self._stops is None and self._reader is None:
            self.num_tokens += len(token_ids)
            text = push(token_ids[0]) if len(token_ids) == 1 else "".join(map(push, token_ids))
            return Shown(text), len(token_ids)
        shown = Shown()
        for taken, token_id in enumerate(token_ids, start=1):
            self.num_tokens += 1
            piece = push(token_id)
            if piece:
                shown += self._show(self._until_stop(piece))
                if self._is_cut:
                    return shown, taken
        return shown, len(token_ids)

    def _until_stop(self, text: str) -> str:
        if self._stops is None or not text:
            return text
        return self._stops.push(text, is_armed=self.num_tokens > self._min_tokens)

    def _show(self, text: str) -> Shown:
        return Shown(text) if self._reader is None else self._reader.push(text)

    def _push(self, token_id: int) -> str:
        assert self._offsets is not None
        self._offsets.append(self._num_chars)
        piece = self._detokenizer.push(token_id)
        self._num_chars += len(piece)
        return piece

    def _taken_offsets(self) -> list[int]:
        taken, self._offsets = self._offsets, []
        assert taken is not None
        return taken

    def _flush(self, shown: Shown) -> Shown:
        """`shown` and what is still held back in front of it."""
        if not self._is_cut:
            text = self._until_stop(self._detokenizer.flush())
            if self._stops is not None and self._matched is None:
                text += self._stops.finish()
            shown += self._show(text)
        return shown if self._reader is None else shown + self._reader.finish()

    def _last_delta(self, shown: Shown, *, delta: TokenDelta) -> TextDelta:
        is_own_end = not self._is_cut
        shown = self._flush(shown)
        matched = self._matched
        reason = delta.finish_reason if is_own_end and matched is None else FinishReason.STOP
        if reason is FinishReason.STOP and self._reader is not None and self._reader.ends_with_calls:
            reason = FinishReason.TOOL_CALLS
        self.finish_reason = reason
        return self._delta(shown, stop_reason=self._stop_reason(delta, is_own_end=is_own_end))

    def _stop_reason(self, delta: TokenDelta, *, is_own_end: bool) -> int | str | None:
        return delta.stop_token_id if is_own_end and self._matched is None else self._matched

    def _delta(self, shown: Shown, *, stop_reason: int | str | None = None) -> TextDelta:
        token_ids = tuple(self._waiting_ids)
        self._waiting_ids.clear()
        self._num_shown += len(shown.text) + len(shown.reasoning)
        logprobs = None
        if self._waiting_logprobs:
            logprobs = tuple(map(self._cut, self._waiting_logprobs))
            self._waiting_logprobs.clear()
        return TextDelta(
            request_id=self._request_id,
            index=self._index,
            text=shown.text,
            reasoning=shown.reasoning,
            tool_calls=shown.tool_calls,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=stop_reason,
        )

    def _cut(self, logprob: TextLogprob) -> TextLogprob:
        """A stop string, whose end is known only now, may have cut the text before the token."""
        if self.finish_reason is None or self._reader is not None or logprob.text_offset <= self._num_shown:
            return logprob
        return replace(logprob, text_offset=self._num_shown)

    def _logprob(self, logprobs: TokenLogprobs, offset: int) -> TextLogprob:
        top = tuple(text_logprob(self._tokenizer, each) for each in logprobs.top)
        return text_logprob(self._tokenizer, logprobs.sampled, top=top, offset=offset)
