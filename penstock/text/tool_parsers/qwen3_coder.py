"""Qwen 3 Coder: `<tool_call><function=f><parameter=city>Paris</parameter></function></tool_call>`.

Values are bare; whether `3` is a number or text, the schema says.
"""

import json
import re
from collections.abc import Mapping
from typing import Final

from penstock.text.cursor import MalformedError, Reading
from penstock.text.json_scanner import JsonScanner
from penstock.text.tool_parsers.lark import LarkWriter
from penstock.text.tool_parsers.members import is_text, members_of
from penstock.text.tool_parsers.parser import ToolParser

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"
FUNCTION: Final = "<function="
PARAMETER: Final = "<parameter="
_ENDS: Final = ("\n</parameter>", "</parameter>")
_KEY: Final = re.compile(r"[^<>\n]*")
_LINE_END: Final = re.compile(r"[\r\n]*")
_PYTHON: Final = {"True": "true", "False": "false", "None": "null"}


class Qwen3CoderParser(ToolParser):
    """Text streams; other values are held back until they are complete."""

    name = "qwen3_coder"
    markers = (OPEN, CLOSE)
    trigger = OPEN

    @classmethod
    def call_rule(cls, lark: LarkWriter, name: str, schema: Mapping[str, object]) -> str:
        """See `ToolParser`; arguments come in the order of the schema."""
        parts = [lark.text(f"{OPEN}\n{FUNCTION}{name}>\n")]
        for index, member in enumerate(members_of(schema)):
            rule = f"value_{lark.num_rules}_{index}"
            end = f"{_ENDS[0]}\n"
            if is_text(member.schema):
                value = _text_rule(lark, rule, member.schema, end=end)
            else:
                value = f"{lark.rule(rule, lark.schema(member.schema))} {lark.text(end)}"
            whole = f"{lark.text(f'{PARAMETER}{member.name}>{chr(10)}')} {value}"
            parts.append(whole if member.is_required else f"({whole})?")
        return " ".join((*parts, lark.text(f"</function>\n{CLOSE}")))

    def _parse(self) -> Reading[None]:
        while not self.is_ended:
            marker = yield from self._find_call((OPEN, FUNCTION))
            if not marker:
                return
            if (yield from self._try(self._tagged(marker))):
                yield from self._skip_close((CLOSE,))

    def _tagged(self, marker: str) -> Reading[None]:
        cursor = self.cursor
        if marker == OPEN:
            yield from cursor.skip_space()
            yield from cursor.expect(FUNCTION)
        name = yield from self._take_name()
        yield from cursor.expect(">")
        self._announce(name)
        properties = self.schemas[name].get("properties")
        schemas = properties if isinstance(properties, dict) else {}
        separator = "{"
        while True:
            yield from cursor.skip_space()
            if not (yield from cursor.match(PARAMETER)):
                break
            key = yield from cursor.take(_KEY, num_chars_max=256)
            yield from cursor.expect(">")
            self._argue(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
            separator = ", "
            yield from self._value(is_text(schemas.get(key, {"type": "string"})))
        self._argue("{}" if separator == "{" else "}")
        self._end_call()
        yield from cursor.match("</function>")

    def _value(self, is_string: bool | None) -> Reading[None]:
        """One value and its closing tag; `is_string` None: text only if it is not JSON."""
        cursor = self.cursor
        yield from cursor.take(_LINE_END, num_chars_max=1)
        if is_string:
            self._argue('"')
            end = yield from cursor.find(_ENDS, lambda text: self._argue(_escaped(text)))
            self._argue('"')
        else:
            cursor.hold()
            parts: list[str] = []
            end = yield from cursor.find(_ENDS, parts.append)
            if end:
                cursor.drop()
                self._argue(_as_json("".join(parts)))
        if not end:
            raise MalformedError("the answer ends in a value")


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _as_json(text: str) -> str:
    """JSON as it is, Python's constants as JSON, anything else as text."""
    word = text.strip(" \t\r\n")
    parts: list[str] = []
    scanner = JsonScanner(parts.append)
    end = scanner.scan(word, 0)
    scanner.finish()
    if end == len(word) and scanner.is_done:
        return "".join(parts)
    return _PYTHON.get(word) or json.dumps(text, ensure_ascii=False)


def _text_rule(lark: LarkWriter, rule: str, schema: object, *, end: str) -> str:
    """Bare text up to the closing tag, or one of the texts that the schema lists."""
    values = schema.get("enum") if isinstance(schema, dict) else None
    if isinstance(values, list):
        listed = " | ".join(lark.text(str(value)) for value in values)
        return f"({listed}) {lark.text(end)}"
    return lark.until(rule, end)
