"""Tools on OpenAI's wire: what a chat request may say of them, and how calls are written in answers."""

from typing import Annotated, Final, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from penstock.core.errors import InvalidParameterError
from penstock.core.text import ToolCallDelta, ToolChoice, ToolMode
from penstock.core.tools import MAX_DESCRIPTION_CHARS, MAX_TOOLS
from penstock.server.sse import encode, encode_text
from penstock.server.validation import AnswerModel, Flag, Text, WireModel

MAX_KEYS: Final = 1024
"""Keys of one object in a schema, as in every body."""

FunctionName = Annotated[
    Text,
    Field(min_length=1, max_length=64, json_schema_extra={"pattern": "^[a-zA-Z0-9_-]+$"}),
]


class FunctionDefinition(WireModel):
    """A function that the model may call."""

    name: FunctionName
    description: Annotated[Text, Field(max_length=MAX_DESCRIPTION_CHARS)] | None = None
    parameters: Annotated[dict[str, object], Field(max_length=MAX_KEYS)] | None = Field(
        default=None, description="JSON schema of its arguments, an object; absent: it takes none."
    )
    strict: Flag | None = Field(
        default=None,
        description="True: the arguments follow the schema also with tool_choice auto; with required or a "
        "named function they always do.",
    )


class Tool(WireModel):
    """One tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(WireModel):
    """The function to call."""

    name: FunctionName


class NamedToolChoice(WireModel):
    """Call exactly this function."""

    type: Literal["function"]
    function: NamedFunction


class FunctionCall(AnswerModel):
    """What to call; `arguments` is a JSON object as text, unless max_tokens cut it."""

    name: str
    arguments: str


class AnsweredToolCall(AnswerModel):
    """One call that the model makes; its result goes back in a message of role tool with the same id."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class OmitsNull(AnswerModel):
    """An answer that leaves out fields which say nothing."""

    @model_serializer(mode="wrap")
    def _without_null(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        fields: dict[str, object] = handler(self)
        return {name: value for name, value in fields.items() if value is not None or name in _ALWAYS}


_ALWAYS: Final = frozenset({"content", "refusal"})
"""Fields that OpenAI sends even if they are null."""

ToolChoiceField = Literal["none", "auto", "required"] | NamedToolChoice
Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)]


def to_tools(tools: list[Tool] | None) -> tuple[dict[str, object], ...]:
    """Domain form of `tools`: plain data without fields that say nothing."""
    return tuple(
        {"type": "function", "function": tool.function.model_dump(exclude_none=True)} for tool in tools or ()
    )


def to_tool_choice(choice: ToolChoiceField | None, *, has_tools: bool) -> ToolChoice:
    """Domain form of `tool_choice`.

    Raises:
        InvalidParameterError: it asks for a call and there are no tools.
    """
    if choice is None:
        return ToolChoice()
    if not has_tools and choice != "none":
        raise InvalidParameterError("tool_choice is given, it needs tools", param="tool_choice")
    if isinstance(choice, str):
        return ToolChoice(ToolMode(choice))
    return ToolChoice(ToolMode.NAMED, choice.function.name)


def encode_call_delta(call: ToolCallDelta) -> bytes:
    """A piece of a call as it stands in a chunk: id, type and name with the first one only."""
    if not call.id:
        return b'[{"index":%d,"function":{"arguments":%b}}]' % (call.index, encode_text(call.arguments))
    return b'[{"index":%d,"id":%b,"type":"function","function":{"name":%b,"arguments":%b}}]' % (
        call.index,
        encode(call.id),
        encode(call.name),
        encode_text(call.arguments),
    )
