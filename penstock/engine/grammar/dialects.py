"""Every kind of grammar as llguidance's own text. Pure: it compiles nothing. Called by `compiler`."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from penstock.core.grammar import GrammarKind, GrammarSpec
from penstock.engine.grammar.schema_rewrite import rewrite_schema
from penstock.engine.grammar.schema_width import check_width
from penstock.engine.grammar.structural_tag import structural_tag_to_lark

if TYPE_CHECKING:  # a name of the stub file
    from llguidance._lib import JsonCompileOptions

JSON_FORM: "Final[JsonCompileOptions]" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}
"""JSON is written as Python's `json.dumps` does, the form that models and chat templates know best: one form,
so that keys are forced and a model cannot go on with blanks for ever. What cannot be enforced is refused."""
ANY_OBJECT: Final = '{"type":"object"}'
ANYTHING: Final = "{}"
"""What the schema true means; llguidance takes objects only."""


def to_llguidance(spec: GrammarSpec, *, special_ids: Mapping[str, int], rewrites: bool = False) -> str:
    """The text that `LLMatcher` takes.

    Args:
        spec: validated.
        special_ids: the tokenizer's special tokens by their text.
        rewrites: say JSON Schemas in keywords that llguidance has.

    Raises:
        ValueError: it is malformed, or an object of it too wide; says how.
        SchemaTooLargeError: a rewritten schema would be.
    """
    match spec.kind:
        case GrammarKind.JSON_SCHEMA:
            check_width(json.loads(spec.source))
            return _json_schema(_rewritten_source(spec.source) if rewrites else spec.source)
        case GrammarKind.JSON_OBJECT:
            return _json_schema(ANY_OBJECT)
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(_whole_regex(spec.source))
        case GrammarKind.CHOICE:
            return LLMatcher.grammar_from_lark(_choice_to_lark(json.loads(spec.source)))
        case GrammarKind.GRAMMAR:
            return LLMatcher.grammar_from_lark(_lark(spec.source))
        case GrammarKind.STRUCTURAL_TAG:
            tag = json.loads(spec.source)
            check_width(tag)
            lark = structural_tag_to_lark(tag, form=JSON_FORM, special_ids=special_ids, rewrites=rewrites)
            return LLMatcher.grammar_from_lark(lark)


def _rewritten_source(source: str) -> str:
    """A schema in other keywords; the same text if there is nothing to rewrite."""
    schema = json.loads(source)
    rewritten = json.dumps(rewrite_schema(schema))
    return source if rewritten == json.dumps(schema) else rewritten


def _json_schema(source: str) -> str:
    if source.strip() == "false":
        raise ValueError("the schema is false, which nothing satisfies")
    source = ANYTHING if source.strip() == "true" else source
    return LLMatcher.grammar_from_json_schema(source, overrides=JSON_FORM)


def _whole_regex(source: str) -> str:
    r"""The same; llguidance drops a backslash at the end, which escapes nothing."""
    if (len(source) - len(source.rstrip("\\"))) % 2:
        raise ValueError("it ends with a backslash that escapes nothing")
    return source


def _choice_to_lark(choices: list[str]) -> str:
    """One terminal, so that the lexer alone decides: a rule of many literals compiles twice as long."""
    return "start: CHOICE\nCHOICE: " + " | ".join(
        json.dumps(choice, ensure_ascii=False).replace("\x7f", "\\u007f") for choice in choices
    )


def _lark(source: str) -> str:
    """A grammar in Lark's dialect as it is, one in GBNF converted."""
    try:
        return any_to_lark(source)
    except Exception as error:  # noqa: BLE001  the converter raises bare Exception
        raise ValueError(
            f"it is neither Lark (with a rule start:) nor GBNF (with root ::=): {error}"
        ) from None
