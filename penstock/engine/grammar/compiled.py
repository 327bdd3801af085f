"""A grammar that can be enforced, as `compiler` makes it, `cache` keeps it and `matcher` follows it."""

from collections.abc import Callable
from dataclasses import dataclass

from llguidance import LLMatcher, LLTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """See the module."""

    start: LLMatcher
    """At its beginning; copied for each answer. Copies share what the lexer has derived."""
    tokenizer: LLTokenizer
    forget: Callable[[], None]
    """Drops it from the cache, when a copy's lexer has met a limit."""
    charge: Callable[[int], None]
    """Counts more bytes, for lexer states that its answers have derived: they stay with the grammar."""
    num_bytes: int
    """Charged for it in the cache, about."""
