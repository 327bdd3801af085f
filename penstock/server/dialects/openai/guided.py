"""The request fields that say what an answer must look like, and their way into one `GrammarSpec`.

OpenAI's `response_format`, and vLLM's `structured_outputs` and `guided_*`. At most one of them may ask for
something: the others would be ignored. `SamplingFields` has them, the plain dialect `structured_outputs`.
"""

from typing import Annotated, Final, Literal

from pydantic import ConfigDict, Field

from penstock.core.errors import InvalidParameterError
from penstock.core.grammar import (
    MAX_CHOICES,
    MAX_GRAMMAR_BYTES,
    AskedGrammar,
    GrammarKind,
    GrammarSpec,
    validate_grammar,
)
from penstock.server.validation import Flag, Text, WireModel

MAX_NAME_CHARS: Final = 256
MAX_DESCRIPTION_CHARS: Final = 16_384
MAX_TAGS: Final = 256
MAX_TAG_CHARS: Final = 1024

JsonObject = dict[str, object]
GrammarText = Annotated[Text, Field(min_length=1, max_length=MAX_GRAMMAR_BYTES)]
TagText = Annotated[Text, Field(max_length=MAX_TAG_CHARS)]
Schema = JsonObject | Flag
Tags = Annotated[list[TagText], Field(fail_fast=True, min_length=1, max_length=MAX_TAGS)]
Choices = Annotated[
    list[Annotated[Text, Field(min_length=1)]], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)
]


class NamedSchema(WireModel):
    """OpenAI's `json_schema`: always enforced, whatever `strict` says."""

    model_config = ConfigDict(populate_by_name=True)

    name: Annotated[Text, Field(min_length=1, max_length=MAX_NAME_CHARS)] | None = None
    description: Annotated[Text, Field(max_length=MAX_DESCRIPTION_CHARS)] | None = None
    schema_: Schema | None = Field(
        default=None, alias="schema", description="Draft 2020-12. Absent: any object."
    )
    strict: Flag | None = Field(default=None, description="The schema is enforced in any case.")


class Structure(WireModel):
    """A tagged part of an answer, in vLLM's older form."""

    model_config = ConfigDict(populate_by_name=True)

    begin: Annotated[TagText, Field(min_length=1)]
    schema_: Schema | None = Field(default=None, alias="schema")
    end: TagText


Structures = Annotated[list[Structure], Field(fail_fast=True, min_length=1, max_length=MAX_TAGS)]


class ResponseFormat(WireModel):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: NamedSchema | None = Field(default=None, description="With type json_schema.")
    structures: (
        Annotated[list[Structure], Field(fail_fast=True, min_length=1, max_length=MAX_TAGS)] | None
    ) = Field(default=None, description="With type structural_tag, older form.")
    triggers: Tags | None = Field(default=None, description="With type structural_tag, older form.")
    format: JsonObject | None = Field(default=None, description="With type structural_tag, newer form.")


class StructuredOutputs(WireModel):
    """vLLM's `structured_outputs`; exactly one field is set."""

    model_config = ConfigDict(populate_by_name=True)

    json_: GrammarText | Schema | None = Field(
        default=None, alias="json", description="A JSON Schema, as an object or as text."
    )
    regex: GrammarText | None = None
    choice: Choices | None = None
    grammar: GrammarText | None = Field(default=None, description="Lark (llguidance's dialect) or GBNF.")
    json_object: Flag | None = None
    structural_tag: GrammarText | JsonObject | None = Field(
        default=None, description="A structural tag, as an object or as text."
    )


class GuidedFields(WireModel):
    """The fields of both OpenAI endpoints; null is the same as absent."""

    response_format: ResponseFormat | None = Field(
        default=None, description="What the answer must look like; enforced while it is generated."
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="vLLM's way to say what the answer must look like."
    )
    guided_json: GrammarText | Schema | None = Field(
        default=None, description="As structured_outputs.json; older name."
    )
    guided_regex: GrammarText | None = Field(
        default=None, description="As structured_outputs.regex; older name."
    )
    guided_choice: Choices | None = Field(
        default=None, description="As structured_outputs.choice; older name."
    )
    guided_grammar: GrammarText | None = Field(
        default=None, description="As structured_outputs.grammar; older name."
    )


Named = dict[str, GrammarSpec]
"""Grammars by the field that asks for them."""


def grammar_of(fields: GuidedFields) -> AskedGrammar:
    """The one grammar that a request asks for.

    Raises:
        InvalidParameterError: there are two, or one is malformed or beyond a limit.
    """
    asked: Named = {}
    if fields.response_format is not None:
        asked |= _of_response_format(fields.response_format)
    if fields.structured_outputs is not None:
        asked |= of_structured_outputs(fields.structured_outputs)
    if fields.guided_json is not None:
        asked["guided_json"] = GrammarSpec.of(GrammarKind.JSON_SCHEMA, fields.guided_json)
    if fields.guided_regex is not None:
        asked["guided_regex"] = GrammarSpec(kind=GrammarKind.REGEX, source=fields.guided_regex)
    if fields.guided_choice is not None:
        asked["guided_choice"] = GrammarSpec.of(GrammarKind.CHOICE, fields.guided_choice)
    if fields.guided_grammar is not None:
        asked["guided_grammar"] = GrammarSpec(kind=GrammarKind.GRAMMAR, source=fields.guided_grammar)
    return only_one(asked)


def only_one(asked: Named) -> AskedGrammar:
    """The grammar of the one field that asks for any, or none.

    Raises:
        InvalidParameterError: names two fields that both do, or what is wrong with the one.
    """
    if len(asked) > 1:
        first, second = list(asked)[:2]
        raise InvalidParameterError(
            f"{first} and {second} are both set, an answer follows one grammar; leave one out", param=second
        )
    for name, spec in asked.items():
        validate_grammar(spec, param=name)
        return AskedGrammar(spec=spec, param=name)
    return AskedGrammar()


def _of_response_format(wanted: ResponseFormat) -> Named:
    _check_parts(wanted)
    if wanted.type == "json_object":
        return {"response_format": GrammarSpec(kind=GrammarKind.JSON_OBJECT)}
    if wanted.type == "json_schema":
        schema = None if wanted.json_schema is None else wanted.json_schema.schema_
        if schema is None:
            return {"response_format": GrammarSpec(kind=GrammarKind.JSON_OBJECT)}
        return {"response_format": GrammarSpec.of(GrammarKind.JSON_SCHEMA, schema)}
    if wanted.type == "structural_tag":
        tag = wanted.model_dump(by_alias=True, exclude_none=True)
        return {"response_format": GrammarSpec.of(GrammarKind.STRUCTURAL_TAG, tag)}
    return {}


_PARTS: Final[dict[str, tuple[str, ...]]] = {
    "json_schema": ("json_schema",),
    "structural_tag": ("structures", "triggers", "format"),
}


def _check_parts(wanted: ResponseFormat) -> None:
    """Refuse parts that belong to another type, and a type without its parts."""
    for kind, names in _PARTS.items():
        for name in names:
            if wanted.type != kind and getattr(wanted, name) is not None:
                path = f"response_format.{name}"
                raise InvalidParameterError(f"{path} belongs to type {kind}, not {wanted.type}", param=path)
    if wanted.type == "json_schema" and wanted.json_schema is None:
        raise InvalidParameterError(
            "response_format.json_schema is missing, type json_schema needs it",
            code="missing",
            param="response_format.json_schema",
        )


def of_structured_outputs(wanted: StructuredOutputs) -> Named:
    """The grammars in `structured_outputs`, by path.

    Raises:
        InvalidParameterError: there is none.
    """
    asked: Named = {}
    if wanted.json_ is not None:
        asked["structured_outputs.json"] = GrammarSpec.of(GrammarKind.JSON_SCHEMA, wanted.json_)
    if wanted.regex is not None:
        asked["structured_outputs.regex"] = GrammarSpec(kind=GrammarKind.REGEX, source=wanted.regex)
    if wanted.choice is not None:
        asked["structured_outputs.choice"] = GrammarSpec.of(GrammarKind.CHOICE, wanted.choice)
    if wanted.grammar is not None:
        asked["structured_outputs.grammar"] = GrammarSpec(kind=GrammarKind.GRAMMAR, source=wanted.grammar)
    if wanted.json_object:
        asked["structured_outputs.json_object"] = GrammarSpec(kind=GrammarKind.JSON_OBJECT)
    if wanted.structural_tag is not None:
        asked["structured_outputs.structural_tag"] = GrammarSpec.of(
            GrammarKind.STRUCTURAL_TAG, wanted.structural_tag
        )
    if not asked:
        names = "json, regex, choice, grammar, json_object, structural_tag"
        raise InvalidParameterError(
            f"structured_outputs is empty, it must hold one of {names}", param="structured_outputs"
        )
    return asked
