"""Plain data to a pydantic model; pydantic's complaints become our own words.

A message names the field, what was sent and the limit. The library's text never leaves the server.
"""

import re
from collections.abc import Callable
from typing import Annotated, Final, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from penstock.core.errors import InvalidParameterError

M = TypeVar("M", bound=BaseModel)
_WORD: Final = re.compile(r"[A-Za-z0-9_.-]{1,32}")
_MAX_PATH_CHARS: Final = 200


def _integral(value: object) -> object:
    """JSON knows one kind of number: 2.0 is an integer."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


WHOLE: Final = BeforeValidator(_integral)
"""Behind the bounds of a strict int, so that they are the schema's minimum and maximum."""
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]


class WireModel(BaseModel):
    """A request's body: fields that it does not know are refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class AnswerModel(BaseModel):
    """An answer; if a fault of ours makes one that does not fit, the log does not get its text."""

    model_config = ConfigDict(hide_input_in_errors=True)


_WANTED: Final[dict[str, str]] = {
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "list_type": "an array",
    "tuple_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
    "string_pattern_mismatch": "a token id in digits, without leading zeros",
}
_BOUNDED: Final[dict[str, tuple[str, str]]] = {
    "greater_than": ("gt", "greater than {}"),
    "greater_than_equal": ("ge", "at least {}"),
    "less_than": ("lt", "less than {}"),
    "less_than_equal": ("le", "at most {}"),
    "string_too_short": ("min_length", "a string of {} or more characters"),
    "string_too_long": ("max_length", "a string of at most {} characters"),
    "too_short": ("min_length", "of {} or more entries"),
    "too_long": ("max_length", "of at most {} entries"),
    "literal_error": ("expected", "{}"),
}


def describe(value: object) -> str:
    """What was sent, short and harmless: numbers as they are, the rest by kind and size."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        text = repr(value)
        return text if len(text) <= 32 else "a number of many digits"
    if isinstance(value, str):
        return f"a string of {len(value)} character{'s' * (len(value) != 1)}"
    if isinstance(value, (list, tuple)):
        return f"an array of {len(value)} {'entry' if len(value) == 1 else 'entries'}"
    return "an object"


def _limit(error: ErrorDetails) -> str:
    kind = error["type"]
    if kind in _BOUNDED:
        key, words = _BOUNDED[kind]
        return words.format(_json_words(str(error.get("ctx", {}).get(key))))
    return _WANTED.get(kind, "of another form; GET /openapi.json describes it")


def _json_words(expected: str) -> str:
    """The library lists values as Python writes them."""
    return {"True": "true", "False": "false", "None": "null"}.get(expected, expected.replace("'", '"'))


def _parts(error: ErrorDetails, *, data: object) -> list[str]:
    """Where in `data` the error is; the branches of a union, which the client did not write, are left out."""
    parts: list[str] = []
    for part in error["loc"]:
        if isinstance(data, dict) and part in data:
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int):
            data = data[part] if part < len(data) else None
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        parts.append(str(part))
    return parts


def _shown(error: ErrorDetails) -> str:
    """The value; a short word in place of one of a few words is told as it is."""
    value = error["input"]
    is_word = isinstance(value, str) and _WORD.fullmatch(value) is not None
    return f'"{value}"' if is_word and error["type"] == "literal_error" else describe(value)


def _path(error: ErrorDetails, *, data: object) -> str:
    return ascii(".".join(_parts(error, data=data))[:_MAX_PATH_CHARS])[1:-1]


def _raise(error: ErrorDetails, *, data: object) -> NoReturn:
    kind, path = error["type"], _path(error, data=data)
    if kind == "missing":
        raise InvalidParameterError(f"{path} is missing, it is required", code="missing", param=path)
    if kind == "extra_forbidden":
        raise InvalidParameterError(
            f"{path} is not a field that this endpoint knows", code="unknown_parameter", param=path
        )
    where = path or "the body"
    if error["loc"][-1:] == ("[key]",):
        where = f"the key of {where}"
    raise InvalidParameterError(f"{where} is {_shown(error)}, it must be {_limit(error)}", param=path or None)


def validate(data: object, *, model: type[M]) -> M:
    """Make a wire model of plain data.

    Raises:
        InvalidParameterError: the first thing that is wrong.
    """
    check: Callable[[object], M] = model.model_validate
    try:
        return check(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True)
    _raise(_most_telling(details, data=data), data=data)


def _most_telling(details: list[ErrorDetails], *, data: object) -> ErrorDetails:
    """Of a union's many complaints: the right kind of wrong size before the wrong kind, then the deepest."""
    return max(details, key=lambda error: (error["type"] in _BOUNDED, len(_parts(error, data=data))))
