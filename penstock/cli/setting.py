"""How one setting is declared: its sentence, its range, and the annotation that cyclopts reads.

Used by `settings` and the commands; `tools/reference` reads the same declarations for the docs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cyclopts import CoercionError, Parameter, Token, convert

SHOWN_CHARS = 100
"""Of a wrong value, in the message about it."""


def plain(value: float) -> str:
    """A number with all its digits and no exponent."""
    return str(int(value)) if value == int(value) else repr(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Closed interval of legal values; a cyclopts validator."""

    low: float
    high: float

    def __call__(self, _type: object, value: object) -> None:
        """Raise ValueError with the limit if `value` is outside; None passes."""
        if value is None:
            return
        assert isinstance(value, int | float)
        if not (math.isfinite(value) and self.low <= value <= self.high):
            raise ValueError(f"It must be {self}.")

    def __str__(self) -> str:
        return f"between {plain(self.low)} and {plain(self.high)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerOfTwo(Range):
    """A power of two in the interval."""

    def __call__(self, _type: object, value: object) -> None:
        """Raise ValueError with the limit if `value` is not such a power."""
        assert isinstance(value, int)
        if not self.low <= value <= self.high or value & (value - 1):
            raise ValueError(f"It must be {self}.")

    def __str__(self) -> str:
        return f"a power of two from {plain(self.low)} to {plain(self.high)}"


def setting(
    doc: str, *, allowed: Range | None = None, name: str | None = None, many: bool = False
) -> Parameter:
    """Annotation of one setting.

    Args:
        doc: one sentence for `--help` and the reference page.
        allowed: its legal values, if it is a number.
        name: the flag, if it is not the field's own name.
        many: the flag takes every word up to the next flag.
    """
    return Parameter(
        help=doc,
        converter=None if allowed is None else _reader(allowed),
        validator=allowed,
        name=name,
        show_choices=True,
        consume_multiple=many,
    )


def _reader(allowed: Range) -> Callable[[type, Sequence[Token]], object]:
    """What turns the text of a number into one; `1.5` is no whole number, and is never rounded to one."""

    def read(kind: type, tokens: Sequence[Token]) -> object:
        text = tokens[0].value
        try:
            value: object = convert(kind, tokens)
            is_read = kind is not int or "." not in text or float(text) == value
        except (CoercionError, ValueError, OverflowError):
            is_read = False
        if not is_read:
            word = "a whole number" if kind is int else "a number"
            raise ValueError(f'"{text[:SHOWN_CHARS]}" is not {word}. It must be {allowed}.')
        return value

    return read
