"""The tools of a request, checked and bounded in one place for every door; and the calls of an answer.

A tool is a function in OpenAI's form, `{"type": "function", "function": {"name", "description", "parameters",
"strict"}}`, kept as plain data because chat templates take it so.
"""

import re
from collections.abc import Sequence
from typing import Final

import msgspec

from penstock.core.errors import InvalidParameterError
from penstock.core.grammar import json_depth
from penstock.core.text import GenerateRequest, ToolCallDelta, ToolMode

MAX_TOOLS: Final = 128
MAX_SCHEMA_BYTES: Final = 65_536
"""Of one function's `parameters`, as compact JSON."""
MAX_SCHEMA_DEPTH: Final = 32
MAX_DESCRIPTION_CHARS: Final = 16_384
NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}\Z")

_TOOL_KEYS: Final = frozenset({"type", "function"})
_FUNCTION_KEYS: Final = frozenset({"name", "description", "parameters", "strict"})


class CalledTool:
    """One call of an answer, filled while its pieces come."""

    __slots__ = ("_pieces", "id", "name")

    def __init__(self, *, id: str, name: str) -> None:  # noqa: A002 - OpenAI's word
        self.id = id
        self.name = name
        self._pieces: list[str] = []

    @property
    def arguments(self) -> str:
        """A JSON object as text, unless the answer was cut in it."""
        return "".join(self._pieces)

    def add(self, arguments: str) -> None:
        """Append a piece."""
        self._pieces.append(arguments)


def add_calls(calls: list[CalledTool], deltas: Sequence[ToolCallDelta]) -> None:
    """Put pieces of calls where they belong; `calls` is extended and changed."""
    for delta in deltas:
        if delta.id:
            assert delta.index == len(calls), "calls begin in order"
            calls.append(CalledTool(id=delta.id, name=delta.name))
        calls[delta.index].add(delta.arguments)


def _refuse(path: str, problem: str) -> InvalidParameterError:
    return InvalidParameterError(f"{path} {problem}", param=path)


def tool_name(tool: dict[str, object]) -> str:
    """The name of a checked tool."""
    function = tool["function"]
    assert isinstance(function, dict)
    name = function["name"]
    assert isinstance(name, str)
    return name


def tool_schema(tool: dict[str, object]) -> dict[str, object]:
    """The JSON schema of a checked tool's arguments; without `parameters` it takes none."""
    function = tool["function"]
    assert isinstance(function, dict)
    schema = function.get("parameters")
    return schema if isinstance(schema, dict) and schema else {"type": "object", "properties": {}}


def is_strict(tool: dict[str, object]) -> bool:
    """Whether the arguments of a checked tool must follow its schema even where the model decides to call."""
    function = tool["function"]
    assert isinstance(function, dict)
    return function.get("strict") is True


def validate_tools(request: GenerateRequest) -> None:
    """Check `tools`, `tool_choice` and what they mean together.

    Raises:
        InvalidParameterError: names the field, its value and the limit.
    """
    tools = request.tools
    if len(tools) > MAX_TOOLS:
        raise _refuse("tools", f"has {len(tools)} entries, it must have at most {MAX_TOOLS}")
    names: set[str] = set()
    for index, tool in enumerate(tools):
        _check_tool(tool, path=f"tools.{index}")
        name = tool_name(tool)
        if name in names:
            raise _refuse(f"tools.{index}.function.name", f"is {name!r}, another tool has that name")
        names.add(name)
    _check_choice(request, names=names)


def _check_choice(request: GenerateRequest, *, names: set[str]) -> None:
    choice = request.tool_choice
    if not names and choice.mode in {ToolMode.REQUIRED, ToolMode.NAMED}:
        raise _refuse("tool_choice", f"is {choice.mode}, it needs tools")
    if choice.mode is ToolMode.NAMED and choice.name not in names:
        raise _refuse("tool_choice", f"names {choice.name[:64]!r}, it must name one of tools")


def _check_tool(tool: dict[str, object], *, path: str) -> None:
    if tool.get("type") != "function":
        raise _refuse(f"{path}.type", "must be 'function'")
    _refuse_keys(tool, known=_TOOL_KEYS, path=path)
    function = tool.get("function")
    if not isinstance(function, dict):
        raise _refuse(f"{path}.function", "must be an object")
    _refuse_keys(function, known=_FUNCTION_KEYS, path=f"{path}.function")
    _check_function(function, path=f"{path}.function")


def _refuse_keys(value: dict[str, object], *, known: frozenset[str], path: str) -> None:
    unknown: Sequence[str] = [key for key in value if key not in known]
    if unknown:
        raise _refuse(path, f"has the field {unknown[0][:64]!a}, it knows only {', '.join(sorted(known))}")


def _check_function(function: dict[str, object], *, path: str) -> None:
    name = function.get("name")
    if not isinstance(name, str) or not NAME.match(name):
        shown = f"{name[:80]!a}" if isinstance(name, str) else "missing"
        raise _refuse(f"{path}.name", f"is {shown}, it must be 1 to 64 of the characters a-z A-Z 0-9 _ -")
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise _refuse(f"{path}.description", "must be a string")
    if description is not None and len(description) > MAX_DESCRIPTION_CHARS:
        raise _refuse(
            f"{path}.description",
            f"has {len(description)} characters, it must have at most {MAX_DESCRIPTION_CHARS}",
        )
    if function.get("strict") not in {None, True, False}:
        raise _refuse(f"{path}.strict", "must be true, false or null")
    _check_schema(function.get("parameters"), path=f"{path}.parameters")


def _check_schema(schema: object, *, path: str) -> None:
    if schema is None:
        return
    if not isinstance(schema, dict):
        raise _refuse(path, "must be a JSON schema, an object")
    try:
        text = msgspec.json.encode(schema)
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise _refuse(
            path, f"must hold JSON values, not nested deeper than {MAX_SCHEMA_DEPTH} levels"
        ) from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise _refuse(path, f"has {len(text)} bytes, it must have at most {MAX_SCHEMA_BYTES}")
    depth = json_depth(text.decode())
    if depth > MAX_SCHEMA_DEPTH:
        raise _refuse(path, f"is nested {depth} levels deep, it must be at most {MAX_SCHEMA_DEPTH}")
    kind = schema.get("type", "object")
    if kind != "object":
        raise _refuse(f"{path}.type", "must be 'object': arguments are an object")
