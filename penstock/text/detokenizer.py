"""Token ids to text, one token at a time, at a cost that does not grow with the answer.

Works on token bytes: a UTF-8 state machine holds back the bytes of an unfinished character, so the deltas
joined are exactly the whole sequence's bytes decoded at once (broken bytes become U+FFFD). It never looks
back at earlier tokens and never decodes twice. Not the search for stop strings (`stop_strings`). Used by
`answer`.
"""

import codecs

from penstock.text.token_table import LeadingSpace
from penstock.text.tokenizer import Tokenizer

_make_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """State of one answer's text: at most 3 held bytes.

    Law: for any ids, `"".join(push(i) for i in ids) + flush() == tokenizer.decode(ids)`; and with
    `at_start=False` the same without the leading-space rule, so a prompt's text and its answer's text join.
    """

    __slots__ = ("_at_start", "_decoder", "_has_held", "_skipped", "_table", "_text_by_id")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool,
        at_start: bool,
        kept_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Begin a text.

        Args:
            tokenizer: whose tokens will come.
            skip_special_tokens: leave special tokens out, all but `kept_ids`.
            at_start: False if visible text came before (an answer after a prompt).
            kept_ids: special tokens that mark parts of the answer for those who read it.
        """
        self._table = tokenizer.table
        self._text_by_id = tokenizer.table.text_by_id
        special_ids = tokenizer.table.special_ids
        if kept_ids:
            special_ids -= kept_ids
        self._skipped = special_ids if skip_special_tokens else frozenset()
        self._decoder = _make_decoder("replace")
        self._has_held = False
        self._at_start = at_start and tokenizer.table.leading_space is not LeadingSpace.KEEP

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly empty."""
        if token_id in self._skipped:
            return ""
        if self._has_held or self._at_start:
            return self._push_slowly(token_id)
        text = self._text_by_id.get(token_id)
        return self._push_slowly(token_id) if text is None else text

    def flush(self) -> str:
        """End the text: U+FFFD for bytes of a character that never came."""
        self._has_held = False
        return self._decoder.decode(b"", True)

    def _push_slowly(self, token_id: int) -> str:
        is_first, self._at_start = self._at_start, False
        if not is_first:
            return self._decode(self._table.token_bytes(token_id))
        if self._table.leading_space is LeadingSpace.STRIP_FIRST_TOKEN:
            return self._decode(self._table.first_token_bytes(token_id))
        spelled = self._table.token_bytes(token_id)
        # A token without bytes does not begin the text.
        self._at_start = not spelled
        return self._decode(spelled.removeprefix(b" "))

    def _decode(self, spelled: bytes) -> str:
        text = self._decoder.decode(spelled)
        self._has_held = bool(self._decoder.getstate()[0])
        return text
