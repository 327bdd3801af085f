"""How each format spells calls, written independently of the parsers; and a way to run a parser over pieces."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from penstock.core.tools import CalledTool, add_calls
from penstock.text.tool_parsers import TOOL_PARSERS
from penstock.text.tool_parsers.deepseek_v3 import BEGIN, BEGIN_ALL, END, END_ALL, SEPARATOR

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


def _keywords(call: Call) -> str:
    return f"{call[0]}({', '.join(f'{key}={value!r}' for key, value in call[1].items())})"


def _xml(call: Call) -> str:
    values = {key: value if isinstance(value, str) else _dump(value) for key, value in call[1].items()}
    inside = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={call[0]}>\n{inside}</function>\n</tool_call>"


def _deepseek(call: Call) -> str:
    return f"{BEGIN}function{SEPARATOR}{call[0]}\n```json\n{_dump(call[1])}\n```{END}"


SPELLINGS: dict[str, Spelling] = {
    "hermes": Spelling(
        one=lambda call: f"<tool_call>\n{_object(call)}\n</tool_call>",
        parts=("<tool_call>", "</tool_call>", '{"name": "f", ', '"arguments": {', "}", " \n"),
    ),
    "llama3_json": Spelling(
        one=lambda call: _object(call, "parameters"),
        join="; ".join,
        parts=("<|python_tag|>", '{"name": "f", ', '"parameters": {', "}", "; "),
    ),
    "mistral": Spelling(
        one=_object,
        join=lambda each: f"[TOOL_CALLS] [{', '.join(each)}]",
        parts=("[TOOL_CALLS]", "[ARGS]", "f", '{"name": "f", ', '"arguments": {', "}", "]"),
    ),
    "pythonic": Spelling(
        one=_keywords,
        join=lambda each: f"[{', '.join(each)}]",
        parts=("<|python_start|>", "[", "f(", "a=", "'x'", '"\\u00e9"', ", ", ")", "]", "1", "True"),
    ),
    "qwen3_coder": Spelling(
        one=_xml,
        parts=(
            "<tool_call>",
            "<function=f>",
            "<parameter=a>",
            "\n</parameter>",
            "</function>",
            "</tool_call>",
        ),
    ),
    "deepseek_v3": Spelling(
        one=_deepseek,
        join=lambda each: BEGIN_ALL + "\n".join(each) + END_ALL,
        parts=(BEGIN_ALL, BEGIN, END, END_ALL, f"function{SEPARATOR}f\n", "```json\n", "```", '{"a": 1}'),
    ),
    "deepseek_v31": Spelling(
        one=lambda call: f"{BEGIN}{call[0]}{SEPARATOR}{_dump(call[1])}{END}",
        join=lambda each: BEGIN_ALL + "".join(each) + END_ALL,
        parts=(BEGIN_ALL, BEGIN, END, END_ALL, f"f{SEPARATOR}", '{"a": 1}'),
    ),
    "generic": Spelling(
        one=lambda call: f"```json\n{_object(call)}\n```",
        parts=("```json", "```", '{"name": "f", ', '"arguments": {', "[", "]", "}", "<tool_call>", ","),
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
