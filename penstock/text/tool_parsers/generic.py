"""For models without a form of their own: a JSON object, or an array of them, that names a tool.

Bare, in a fence of backticks, or in `<tool_call>` tags, wherever it stands. An object is a call only if it
has nothing but the keys of one, the name of a tool and arguments; other JSON is content.
"""

import re
from collections.abc import Mapping
from typing import Final

from penstock.text.cursor import MalformedError, Reading
from penstock.text.tool_parsers.json_calls import JsonToolParser
from penstock.text.tool_parsers.lark import LarkWriter

FENCE: Final = "```"
OPEN: Final = "<tool_call>"
_CLOSES: Final = {FENCE: FENCE, OPEN: "</tool_call>"}
_LANGUAGE: Final = re.compile(r"[a-z_]*")


class GenericParser(JsonToolParser):
    """Tries every object, array and fence; gives up on the first key that no call has."""

    name = "generic"
    markers = (OPEN, _CLOSES[OPEN])
    name_keys = frozenset({"name", "function", "tool", "tool_name"})
    argument_keys = frozenset({"arguments", "parameters", "args", "input"})
    other_keys = frozenset({"type", "id"})
    may_lack_arguments = False
    separators = re.compile(r"[ \t\r\n;,]*")

    @classmethod
    def call_rule(cls, lark: LarkWriter, name: str, schema: Mapping[str, object]) -> str:
        """See `ToolParser`."""
        head = lark.text(f'{{"name": "{name}", "arguments": ')
        return " ".join((head, lark.schema(schema), lark.text("}")))

    def _parse(self) -> Reading[None]:
        while not self.is_ended:
            marker = yield from self._find_call((FENCE, OPEN, "{", "["))
            if not marker:
                return
            if (yield from self._try(self._marked(marker))) and marker in _CLOSES:
                yield from self._skip_close((_CLOSES[marker],))

    def _marked(self, marker: str) -> Reading[None]:
        cursor = self.cursor
        if marker in _CLOSES:
            yield from cursor.take(_LANGUAGE, num_chars_max=16)
            yield from cursor.skip_space()
            marker = yield from cursor.match_any(("{", "["))
        if not marker:
            raise MalformedError("nothing of a call follows")
        yield from self._read_call() if marker == "{" else self._read_array()
