"""Llama 3.1 to 3.3: the answer is `{"name": ..., "parameters": {...}}`, or that behind `<|python_tag|>`.

Several calls are joined by `; `. Without the tag an object is a call only where nothing was said before it.
"""

import re
from collections.abc import Mapping
from typing import Final

from penstock.text.cursor import Reading
from penstock.text.tool_parsers.json_calls import JsonToolParser
from penstock.text.tool_parsers.lark import LarkWriter

TAG: Final = "<|python_tag|>"


class Llama3JsonParser(JsonToolParser):
    """Objects at the beginning, one after another."""

    name = "llama3_json"
    markers = (TAG,)
    other_keys = frozenset({"type", "id"})
    may_lack_arguments = False
    separators = re.compile(r"[ \t\r\n;,]*")

    @classmethod
    def call_rule(cls, lark: LarkWriter, name: str, schema: Mapping[str, object]) -> str:
        """See `ToolParser`."""
        head = lark.text(f'{{"name": "{name}", "parameters": ')
        return " ".join((head, lark.schema(schema), lark.text("}")))

    @classmethod
    def calls_rule(cls, lark: LarkWriter, call: str, *, is_parallel: bool) -> None:
        """See `ToolParser`."""
        lark.rule("calls", f"{call} ({lark.text('; ')} {call})*" if is_parallel else call)

    def _parse(self) -> Reading[None]:
        while not self.is_ended:
            marker = yield from self._find_call((TAG,), at_gap=("{",))
            if not marker:
                return
            yield from self._try(self._tagged() if marker == TAG else self._read_call())

    def _tagged(self) -> Reading[None]:
        yield from self.cursor.skip_space()
        yield from self.cursor.expect("{")
        yield from self._read_call()
