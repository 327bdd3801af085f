"""How each format spells calls, written independently of the parsers; and a way to run a parser over pieces."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from penstock.core.tools import CalledTool, add_calls
from penstock.text.tool_parsers import TOOL_PARSERS

Call = tuple[str, dict]


@dataclass(frozen=True)
class Spelling:
    one: Callable[[Call], str]
    join: Callable[[list[str]], str] = "\n".join
    parts: tuple[str, ...] = ()


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _object(call: Call, key: str = "arguments") -> str:
    return _dump({"name": call[0], key: call[1]})


SPELLINGS: dict[str, Spelling] = {
    "hermes": Spelling(
        one=lambda call: f"<tool_call>\n{_object(call)}\n</tool_call>",
        parts=("<tool_call>", "</tool_call>", '{"name": "f", ', '"arguments": {', "}", " \n"),
    ),
}


def spell(name: str, calls: Sequence[Call]) -> str:
    spelling = SPELLINGS[name]
    return spelling.join([spelling.one(call) for call in calls])


@dataclass
class Read:
    content: str = ""
    calls: list[CalledTool] = field(default_factory=list)
    num_scanned: int = 0

    @property
    def shown(self) -> tuple[str, list[tuple[str, str]]]:
        """Without the ids, which are random."""
        return self.content, [(call.name, call.arguments) for call in self.calls]


def read(name: str, pieces: Iterable[str], schemas: dict, *, is_parallel: bool = True) -> Read:
    parser = TOOL_PARSERS[name](schemas, is_parallel=is_parallel)
    found = Read()
    for parsed in (*map(parser.push, pieces), parser.finish()):
        found.content += parsed.content
        add_calls(found.calls, parsed.calls)
    found.num_scanned = parser.cursor.num_scanned
    return found


def read_whole(name: str, text: str, schemas: dict, *, is_parallel: bool = True) -> Read:
    return read(name, [text], schemas, is_parallel=is_parallel)
