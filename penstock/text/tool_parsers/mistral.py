"""Mistral: `[TOOL_CALLS]` before an array of objects, or before each name with its arguments.

Older models write `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, newer ones
`[TOOL_CALLS]name{...}` or `[TOOL_CALLS]name[ARGS]{...}`, again for each call.
"""

import secrets
import string
from collections.abc import Mapping
from typing import Final

from penstock.text.cursor import Reading
from penstock.text.tool_parsers.json_calls import JsonToolParser
from penstock.text.tool_parsers.lark import LarkWriter

CALLS: Final = "[TOOL_CALLS]"
CALL_ID: Final = "[CALL_ID]"
ARGS: Final = "[ARGS]"
NUM_ID_CHARS: Final = 9
"""The model's templates refuse ids of any other length."""
_ALPHABET: Final = string.ascii_letters + string.digits


class MistralParser(JsonToolParser):
    """Both forms, by what follows the marker."""

    name = "mistral"
    markers = (CALLS, CALL_ID, ARGS)
    trigger = CALLS
    may_lack_arguments = False

    @classmethod
    def call_rule(cls, lark: LarkWriter, name: str, schema: Mapping[str, object]) -> str:
        """See `ToolParser`; the newer form if the model has its token."""
        if lark.is_token(ARGS):
            return " ".join((lark.text(f"{CALLS}{name}{ARGS}"), lark.schema(schema)))
        head = lark.text(f'{{"name": "{name}", "arguments": ')
        return " ".join((head, lark.schema(schema), lark.text("}")))

    @classmethod
    def calls_rule(cls, lark: LarkWriter, call: str, *, is_parallel: bool) -> None:
        """See `ToolParser`."""
        if lark.is_token(ARGS):
            lark.rule("calls", f"{call}+" if is_parallel else call)
            return
        more = f" ({lark.text(', ')} {call})*" if is_parallel else ""
        lark.rule("calls", f"{lark.text(CALLS + '[')} {call}{more} {lark.text(']')}")

    def make_id(self) -> str:
        """See `ToolParser`."""
        return "".join(secrets.choice(_ALPHABET) for _ in range(NUM_ID_CHARS))

    def _parse(self) -> Reading[None]:
        while not self.is_ended and (yield from self._find_call((CALLS,))):
            yield from self._try(self._marked())

    def _marked(self) -> Reading[None]:
        yield from self.cursor.skip_space()
        if (yield from self.cursor.match("[")):
            yield from self._read_array()
        else:
            yield from self._named()

    def _named(self) -> Reading[None]:
        cursor = self.cursor
        name = yield from self._take_name()
        if (yield from cursor.match(CALL_ID)):
            yield from self._take_name()
        yield from cursor.match(ARGS)
        yield from cursor.skip_space()
        yield from self._read_call_of(name)
