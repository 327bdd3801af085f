"""Grammars and refusals by content; the least recently used go first. `compiler` fills it; thread-safe."""

import threading
from collections import OrderedDict
from dataclasses import replace
from typing import Final

from penstock.core.errors import InvalidParameterError
from penstock.core.grammar import GrammarSpec
from penstock.engine.grammar.compiled import Compiled

MAX_CACHED_REFUSALS: Final = 256


class GrammarCache:
    """See the module."""

    def __init__(self, *, max_bytes: int) -> None:
        """Hold nothing.

        Args:
            max_bytes: for compiled grammars; one alone may be larger.
        """
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._compiled: OrderedDict[GrammarSpec, Compiled] = OrderedDict()
        self._refused: OrderedDict[GrammarSpec, InvalidParameterError] = OrderedDict()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Charged for grammars."""
        return self._num_bytes

    def find(self, spec: GrammarSpec) -> Compiled | None:
        """What is known of this grammar.

        Raises:
            InvalidParameterError: it was refused before.
        """
        with self._lock:
            if (error := self._refused.get(spec)) is not None:
                raise error.with_traceback(None)
            found = self._compiled.get(spec)
            if found is not None:
                self._compiled.move_to_end(spec)
            return found

    def put(self, spec: GrammarSpec, compiled: Compiled) -> None:
        """Keep a grammar, unless it is there already."""
        with self._lock:
            if spec in self._compiled:
                return
            self._compiled[spec] = compiled
            self._num_bytes += compiled.num_bytes
            self._evict()

    def put_refusal(self, spec: GrammarSpec, error: InvalidParameterError) -> None:
        """Keep why a grammar cannot be enforced."""
        with self._lock:
            self._refused[spec] = error
            if len(self._refused) > MAX_CACHED_REFUSALS:
                self._refused.popitem(last=False)

    def forget(self, spec: GrammarSpec) -> None:
        """Drop a grammar; one that is not there is ignored."""
        with self._lock:
            if (dropped := self._compiled.pop(spec, None)) is not None:
                self._num_bytes -= dropped.num_bytes

    def charge(self, spec: GrammarSpec, num_bytes: int) -> None:
        """Count more bytes for a grammar; one that is not there is ignored."""
        with self._lock:
            if (grown := self._compiled.get(spec)) is not None:
                self._compiled[spec] = replace(grown, num_bytes=grown.num_bytes + num_bytes)
                self._num_bytes += num_bytes
                self._evict()

    def _evict(self) -> None:
        while self._num_bytes > self._max_bytes and len(self._compiled) > 1:
            _, dropped = self._compiled.popitem(last=False)
            self._num_bytes -= dropped.num_bytes
