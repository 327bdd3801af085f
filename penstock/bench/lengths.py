"""How long prompts and answers are: distributions of token counts, read from one word of the command line."""

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from penstock.core.errors import InvalidParameterError

MAX_LENGTH: Final = 1 << 20
"""Tokens; longer than any context that is served."""
LengthKind = Literal["constant", "uniform", "normal", "lognormal"]
FORMS: Final = "N, uniform:LOW:HIGH, normal:MEAN:STD[:LOW:HIGH] or lognormal:MEDIAN:SIGMA[:LOW:HIGH]"
_ARITY: Final[dict[LengthKind, tuple[int, ...]]] = {
    "constant": (1,),
    "uniform": (2,),
    "normal": (2, 4),
    "lognormal": (2, 4),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """A distribution of token counts; every draw lies in [low, high].

    Raises:
        InvalidParameterError: the limits are not `0 <= low <= high <= MAX_LENGTH`, or a parameter is wrong.
    """

    kind: LengthKind
    first: float
    """Constant: the length. Uniform: not used. Normal: mean. Lognormal: median."""
    second: float = 0.0
    """Normal: standard deviation. Lognormal: sigma of the logarithm."""
    low: int = 1
    high: int = MAX_LENGTH

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= MAX_LENGTH:
            raise InvalidParameterError(
                f"length limits are {self.low} and {self.high}, they must be in order, from 0 to {MAX_LENGTH}"
            )
        if not (math.isfinite(self.first) and math.isfinite(self.second)) or self.second < 0:
            raise InvalidParameterError(
                f"{self.kind} has {self.first} and {self.second}, they must be finite, the spread at least 0"
            )
        if self.kind in {"normal", "lognormal"} and not 0 < self.first <= MAX_LENGTH:
            raise InvalidParameterError(f"{self.kind} has {self.first}, it must be 1 to {MAX_LENGTH}")

    def draw(self, num_draws: int, *, rng: np.random.Generator) -> NDArray[np.int64]:
        """[num_draws] int64, each in [low, high]; the same state of `rng` gives the same lengths."""
        if self.kind == "constant":
            return np.full(num_draws, self.low, dtype=np.int64)
        if self.kind == "uniform":
            return rng.integers(self.low, self.high, size=num_draws, endpoint=True)
        if self.kind == "normal":
            drawn = rng.normal(self.first, self.second, size=num_draws)
        else:
            drawn = rng.lognormal(math.log(self.first), self.second, size=num_draws)
        return np.clip(np.rint(drawn), self.low, self.high).astype(np.int64)

    def __str__(self) -> str:
        if self.kind == "constant":
            return str(self.low)
        if self.kind == "uniform":
            return f"uniform:{self.low}:{self.high}"
        return f"{self.kind}:{self.first:g}:{self.second:g}:{self.low}:{self.high}"


def constant(length: int) -> Lengths:
    """Every draw is `length`."""
    return Lengths(kind="constant", first=float(length), low=length, high=length)


def uniform(low: int, *, high: int) -> Lengths:
    """Every whole number in [low, high] is as likely."""
    return Lengths(kind="uniform", first=0.0, low=low, high=high)


def parse_lengths(text: str, *, param: str, range_ratio: float = 0.0) -> Lengths:
    """Read one word of the command line.

    Args:
        text: see `FORMS`.
        param: the flag, for the message.
        range_ratio: in [0, 1); a constant N then becomes uniform in [N (1 - r), N (1 + r)], as vLLM has it.

    Raises:
        InvalidParameterError: `text` has another form, or a number is out of range.
    """
    try:
        lengths = _parse(text)
    except (ValueError, InvalidParameterError) as error:
        detail = f" ({error})" if isinstance(error, InvalidParameterError) else ""
        raise InvalidParameterError(
            f"{param} is {text!r:.80}, it must be {FORMS}{detail}", param=param
        ) from None
    if not range_ratio:
        return lengths
    if lengths.kind != "constant":
        raise InvalidParameterError(
            f"random_range_ratio is {range_ratio}, it must be 0 with {param} {text}: it has its own range"
        )
    low, high = (round(lengths.low * (1 + sign * range_ratio), 6) for sign in (-1, 1))
    return uniform(math.floor(low), high=math.ceil(high))  # rounded first: 100 * 1.1 is over 110


def _parse(text: str) -> Lengths:
    word, *numbers = text.split(":") if ":" in text else ("constant", text)
    kind: LengthKind | None = next((known for known in _ARITY if known == word), None)
    if kind is None or len(numbers) not in _ARITY[kind]:
        raise ValueError
    if kind == "constant":
        return constant(int(numbers[0]))
    if kind == "uniform":
        return uniform(int(numbers[0]), high=int(numbers[1]))
    low, high = (int(number) for number in numbers[2:]) if len(numbers) == 4 else (1, MAX_LENGTH)
    return Lengths(kind=kind, first=float(numbers[0]), second=float(numbers[1]), low=low, high=high)
