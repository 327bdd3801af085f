"""`StructuredOutputsParams`: what an answer must look like, for the offline API, by vLLM's names."""

import msgspec

from penstock.core.errors import InvalidParameterError
from penstock.core.grammar import GrammarKind, GrammarSpec, validate_grammar


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True):
    """Exactly one field is set."""

    json: str | dict[str, object] | bool | None = None
    """A JSON Schema, as an object or as text."""
    regex: str | None = None
    """A regular expression that the whole answer matches."""
    choice: list[str] | None = None
    """The answer is one of these."""
    grammar: str | None = None
    """Lark (llguidance's dialect) or GBNF."""
    json_object: bool = False
    """Any JSON object."""
    structural_tag: str | dict[str, object] | None = None
    """A structural tag, as an object or as text."""

    def spec(self) -> GrammarSpec:
        """The grammar that is asked for, within its limits.

        Raises:
            InvalidParameterError: none or several are, or it is malformed.
        """
        values: dict[str, object] = msgspec.structs.asdict(self)
        asked = {name: value for name, value in values.items() if value is not None and value is not False}
        if self.json is False:
            asked["json"] = False
        if len(asked) != 1:
            raise InvalidParameterError(
                f"structured_outputs sets {', '.join(asked) or 'nothing'}, it must set exactly one of "
                f"{', '.join(self.__struct_fields__)}",
                param="structured_outputs",
            )
        ((name, value),) = asked.items()
        found = GrammarSpec.of(GrammarKind("json_schema" if name == "json" else name), value)
        validate_grammar(found, param=f"structured_outputs.{name}")
        return found


def grammars_of(value: object, *, num_prompts: int) -> list[GrammarSpec | None]:
    """One grammar, or None, for each prompt.

    Args:
        value: one for all, a list with one or None for each, or None.
        num_prompts: how many there must be.

    Raises:
        InvalidParameterError: it is of another type or length, or one is malformed.
    """
    several = value if isinstance(value, list | tuple) else [value] * num_prompts
    if len(several) != num_prompts:
        raise InvalidParameterError(
            f"structured_outputs has {len(several)} entries, there are {num_prompts} prompts",
            param="structured_outputs",
        )
    return [_checked(each) for each in several]


def _checked(value: object) -> GrammarSpec | None:
    if value is None:
        return None
    if not isinstance(value, StructuredOutputsParams):
        raise InvalidParameterError(
            f"structured_outputs is {value!r:.80}, it must be a StructuredOutputsParams or a list of them",
            param="structured_outputs",
        )
    return value.spec()
