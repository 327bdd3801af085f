"""DeepSeek V3 and R1, and V3.1: calls between special tokens, the name before or behind a separator."""

import re
from collections.abc import Mapping
from typing import Final

from penstock.text.cursor import Reading
from penstock.text.tool_parsers.lark import LarkWriter
from penstock.text.tool_parsers.parser import ToolParser

BEGIN_ALL: Final = "<\uff5ctool\u2581calls\u2581begin\uff5c>"
END_ALL: Final = "<\uff5ctool\u2581calls\u2581end\uff5c>"
BEGIN: Final = "<\uff5ctool\u2581call\u2581begin\uff5c>"
END: Final = "<\uff5ctool\u2581call\u2581end\uff5c>"
SEPARATOR: Final = "<\uff5ctool\u2581sep\uff5c>"


class DeepseekV3Parser(ToolParser):
    """Reads both forms: `function<sep>name` with a fenced object, and `name<sep>` with a bare one."""

    name = "deepseek_v3"
    markers = (BEGIN_ALL, END_ALL, BEGIN, END, SEPARATOR)
    trigger = BEGIN_ALL
    tail = re.compile(r"[ \t\r\n`}]*")

    @classmethod
    def call_rule(cls, lark: LarkWriter, name: str, schema: Mapping[str, object]) -> str:
        """See `ToolParser`."""
        head = lark.text(f"{BEGIN}function{SEPARATOR}{name}\n```json\n")
        return " ".join((head, lark.schema(schema), lark.text(f"\n```{END}")))

    @classmethod
    def calls_rule(cls, lark: LarkWriter, call: str, *, is_parallel: bool) -> None:
        """See `ToolParser`."""
        more = f" ({lark.text(chr(10))}? {call})*" if is_parallel else ""
        lark.rule("calls", f"{lark.text(BEGIN_ALL)} {call}{more} {lark.text(END_ALL)}")

    def _parse(self) -> Reading[None]:
        while not self.is_ended:
            marker = yield from self._find_call((BEGIN_ALL, BEGIN, END_ALL))
            if not marker:
                return
            if marker == END_ALL and self.num_calls:
                self.cursor.drop()
            elif (yield from self._try(self._marked(marker))):
                yield from self._skip_close((END,))

    def _marked(self, marker: str) -> Reading[None]:
        cursor = self.cursor
        if marker == BEGIN_ALL:
            yield from cursor.skip_space()
            yield from cursor.expect(BEGIN)
        name = yield from self._take_name()
        yield from cursor.expect(SEPARATOR)
        if (yield from cursor.peek()) != "{":
            name = yield from self._take_name()
            yield from cursor.skip_space()
            yield from cursor.match_any(("```json", "```"))
            yield from cursor.skip_space()
        yield from self._read_call_of(name)


class DeepseekV31Parser(DeepseekV3Parser):
    """Forces the form of V3.1."""

    name = "deepseek_v31"

    @classmethod
    def call_rule(cls, lark: LarkWriter, name: str, schema: Mapping[str, object]) -> str:
        """See `ToolParser`."""
        return " ".join((lark.text(f"{BEGIN}{name}{SEPARATOR}"), lark.schema(schema), lark.text(END)))
