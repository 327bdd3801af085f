"""Typed reading of a checkpoint's JSON configs.

Every field is checked for type and range before a model is built with it; nothing in the folder is ever
executed (`auto_map` is not read). Each architecture file reads its own config with a `ConfigReader`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from penstock.core.errors import CheckpointError, UnsupportedModelError
from penstock.layers.mlp import Activation

MAX_CONFIG_BYTES: Final = 16 << 20
"""Larger files are refused unread; real ones have a few kilobytes."""
MAX_SIZE: Final = 1 << 24
"""Above every dimension of any model known, small enough that no product of them overflows."""

Json = Any  # a parsed JSON value: its type is what the reader below checks


class ConfigReader:
    """Fields of one JSON object, each read with its type and range.

    Raises (all methods):
        CheckpointError: the field is missing or out of range; names file, field, value, expectation.
    """

    def __init__(self, fields: Mapping[str, Json], *, source: str) -> None:
        self._fields = fields
        self.source = source
        """File name and path inside it, for messages."""

    def has(self, name: str) -> bool:
        """True if the field is there and not null."""
        return self._fields.get(name) is not None

    def having(self, fields: Mapping[str, Json]) -> "ConfigReader":
        """The same with some fields added or replaced."""
        return ConfigReader({**self._fields, **fields}, source=self.source)

    def wrong(self, name: str, expected: str) -> CheckpointError:
        """The error that says that field `name` is not what it must be."""
        value = repr(self._fields.get(name))[:80]
        found = f"is {value}" if name in self._fields else "is missing"
        return CheckpointError(f"{self.source}: field {name!r} {found}, expected {expected}", param=name)

    def integer(self, name: str, default: int | None = None, *, low: int = 1, high: int = MAX_SIZE) -> int:
        """A whole number in [low, high]."""
        value = self._fields.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return value

    def optional_integer(self, name: str, *, low: int = 1, high: int = MAX_SIZE) -> int | None:
        """A whole number in [low, high], or None if absent or null."""
        return self.integer(name, low=low, high=high) if self.has(name) else None

    def number(
        self, name: str, default: float | None = None, *, low: float = 0.0, high: float = 1e12
    ) -> float:
        """A finite number in [low, high]."""
        value = self._fields.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def optional_number(self, name: str, *, low: float = 0.0, high: float = 1e12) -> float | None:
        """A finite number in [low, high], or None if absent or null."""
        return self.number(name, low=low, high=high) if self.has(name) else None

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._fields.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self._fields.get(name)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def one_of(self, name: str, known: Sequence[str], default: str | None = None) -> str:
        """A string out of `known`."""
        value = self.text(name, default)
        if value not in known:
            raise self.wrong(name, f"one of {', '.join(known)}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self._fields.get(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, "a list of strings")
        return tuple(value)

    def numbers(self, name: str, *, length: int) -> tuple[float, ...]:
        """A list of `length` numbers above 0."""
        value = self._fields.get(name)
        if (
            not isinstance(value, list)
            or len(value) != length
            or not all(_is_positive(item) for item in value)
        ):
            raise self.wrong(name, f"a list of {length} numbers above 0")
        return tuple(float(item) for item in value)

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers from 0; empty if absent or null."""
        value = self._fields.get(name)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(_is_index(item) for item in value):
            raise self.wrong(name, "a list of whole numbers from 0")
        return tuple(value)

    def mapping(self, name: str) -> dict[str, str]:
        """An object whose values are strings."""
        value = self._fields.get(name)
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise self.wrong(name, "an object of strings")
        return value

    def refuse(self, name: str, *, unless: Json) -> None:
        """Refuse a checkpoint whose field asks for what is not built here.

        Raises:
            UnsupportedModelError: the field is there, not null and not `unless`.
        """
        value = self._fields.get(name)
        if value is not None and value != unless:
            raise UnsupportedModelError(
                f"{self.source}: field {name!r} is {repr(value)[:80]}, only {unless!r} is supported",
                param=name,
            )

    def supported(self, name: str, known: Sequence[Json], default: Json = None) -> Json:
        """The field's value, or `default` where it is absent or null; one of `known`.

        Raises:
            UnsupportedModelError: it asks for what is not built here; lists what is.
        """
        value = self._fields.get(name)
        value = default if value is None else value
        if isinstance(value, bool) is not any(isinstance(each, bool) for each in known) or value not in known:
            raise UnsupportedModelError(
                f"{self.source}: field {name!r} is {repr(value)[:80]}, which is not supported; "
                f"known: {', '.join(str(each) for each in known)}",
                param=name,
            )
        return value

    def section(self, name: str) -> "ConfigReader":
        """A nested object; empty if absent or null."""
        value = self._fields.get(name)
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return ConfigReader(value, source=f"{self.source}: {name}")

    def sections(self, name: str, *, most: int) -> "list[ConfigReader]":
        """The objects of an object of objects, 1 to `most` of them, in the file's order."""
        value = self._fields.get(name)
        if not isinstance(value, dict) or not 1 <= len(value) <= most:
            raise self.wrong(name, f"an object of 1 to {most} objects")
        whole = self.section(name)
        return [whole.section(each) for each in value]


def _is_index(item: Json) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= MAX_SIZE


def _is_positive(item: Json) -> bool:
    return isinstance(item, (int, float)) and not isinstance(item, bool) and 0 < item < float("inf")


def read_json_config(path: Path) -> ConfigReader:
    """Read one JSON file of a checkpoint.

    Raises:
        CheckpointError: it is missing, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path.name}: larger than the limit of {MAX_CONFIG_BYTES} bytes")
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path.name}: expected a JSON object, found {type(fields).__name__}")
    return ConfigReader(fields, source=path.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """Sizes that every decoder has."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    """Longest context in tokens."""
    tie_word_embeddings: bool
    """The head uses the embedding's weight."""

    @property
    def query_size(self) -> int:
        """All query heads side by side."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """All key heads side by side."""
        return self.num_kv_heads * self.head_dim


def read_decoder_shape(
    reader: ConfigReader, *, head_dim: int | None = None, tied: bool = False
) -> DecoderShape:
    """Read the sizes under the names that most families use.

    Args:
        reader: the `config.json`.
        head_dim: if the config names none; None takes `hidden_size / num_attention_heads`.
        tied: whether head and embedding share a weight if the config does not say.

    Raises:
        CheckpointError: a size is missing, out of range, or does not divide what it must.
    """
    hidden_size = reader.integer("hidden_size")
    num_heads = reader.integer("num_attention_heads")
    num_kv_heads = reader.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise reader.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    if not reader.has("head_dim") and head_dim is None and hidden_size % num_heads:
        raise reader.wrong("hidden_size", f"a multiple of num_attention_heads ({num_heads})")
    return DecoderShape(
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_layers=reader.integer("num_hidden_layers", high=1024),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=reader.integer("head_dim", head_dim or hidden_size // num_heads),
        max_position_embeddings=reader.integer("max_position_embeddings"),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", tied),
    )


def read_activation(reader: ConfigReader, *, name: str = "hidden_act", default: str = "silu") -> Activation:
    """Read which non-linearity the MLP uses.

    Args:
        reader: the `config.json`.
        name: of the field.
        default: if it is absent.

    Raises:
        CheckpointError: the word is not known; the message lists what is.
    """
    words = {word: activation for activation in Activation for word in activation.value}
    return words[reader.one_of(name, list(words), default)]
