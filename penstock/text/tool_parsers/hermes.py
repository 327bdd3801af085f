"""The form of Hermes, Qwen 2.5, Qwen 3 and the embedded model: one JSON object in `<tool_call>` tags."""

from collections.abc import Mapping
from typing import Final

from penstock.text.cursor import Reading
from penstock.text.tool_parsers.json_calls import JsonToolParser
from penstock.text.tool_parsers.lark import LarkWriter

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"


class HermesParser(JsonToolParser):
    """One object between each pair of tags; a closing tag that is missing costs nothing."""

    name = "hermes"
    markers = (OPEN, CLOSE)
    trigger = OPEN

    @classmethod
    def call_rule(cls, lark: LarkWriter, name: str, schema: Mapping[str, object]) -> str:
        """See `ToolParser`."""
        head = lark.text(f'{OPEN}\n{{"name": "{name}", "arguments": ')
        return " ".join((head, lark.schema(schema), lark.text(f"}}\n{CLOSE}")))

    def _parse(self) -> Reading[None]:
        while not self.is_ended and (yield from self._find_call((OPEN,))):
            if (yield from self._try(self._tagged())):
                yield from self._skip_close((CLOSE,))

    def _tagged(self) -> Reading[None]:
        yield from self.cursor.skip_space()
        yield from self.cursor.expect("{")
        yield from self._read_call()
