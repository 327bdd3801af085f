"""Finds stop strings in a stream of text whatever way it is cut, in linear time.

The occurrence that *starts* earliest wins; of two that start together, the one that ends first. That is
what a search of the whole text would say, and it does not depend on where tokens end. Text that may yet
begin a stop string is held back, never more than the longest stop string. Used by `answer`; no regular
expressions.
"""

from collections import deque
from collections.abc import Sequence


class StopAutomaton:
    """Aho-Corasick automaton over a request's stop strings; immutable, shared by its answers.

    Build time and states are at most the sum of the strings' lengths (4 x 64).

    **Source:** Aho and Corasick, "Efficient string matching", CACM 18(6), 1975.
    """

    __slots__ = ("children", "depth", "fail", "first_chars", "longest", "strings")

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.first_chars = frozenset(text[0] for text in strings)
        self.children: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.longest: list[str | None] = [None]
        """Per state: the longest stop string that ends there."""
        for text in strings:
            self._insert(text)
        self.fail = [0] * len(self.depth)
        self._link()

    def _insert(self, text: str) -> None:
        state = 0
        for char in text:
            if char not in self.children[state]:
                self.children[state][char] = len(self.depth)
                self.children.append({})
                self.depth.append(self.depth[state] + 1)
                self.longest.append(None)
            state = self.children[state][char]
        self.longest[state] = text

    def _link(self) -> None:
        queue = deque(self.children[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self.children[state].items():
                self.fail[child] = self.step(self.fail[state], char)
                queue.append(child)
            self.longest[state] = self.longest[state] or self.longest[self.fail[state]]

    def step(self, state: int, char: str) -> int:
        """The next state; amortised constant time."""
        children = self.children
        while state and char not in children[state]:
            state = self.fail[state]
        return children[state].get(char, 0)


class StopSearch:
    """One answer's search. `matched` is the stop string found, after which no text comes."""

    __slots__ = ("_automaton", "_candidate", "_candidate_start", "_held", "_keep", "_state", "matched")

    def __init__(self, automaton: StopAutomaton, *, include_stop_str_in_output: bool) -> None:
        self._automaton = automaton
        self._keep = include_stop_str_in_output
        self._held = ""
        self._state = 0
        self._candidate: str | None = None
        # Offset in `_held`; the candidate stands until no earlier start can become a stop string.
        self._candidate_start = 0
        self.matched: str | None = None

    def push(self, text: str, *, is_armed: bool = True) -> str:
        """Take more text, return what can be shown.

        Args:
            text: the next piece of the answer.
            is_armed: False while stop strings that end in this piece do not count (`min_tokens`).
        """
        assert self.matched is None
        if not self._held and self._automaton.first_chars.isdisjoint(text):
            return text
        begin = len(self._held)
        self._held += text
        for end in range(begin + 1, len(self._held) + 1):
            if self._scan(end, is_armed=is_armed):
                return self._end()
        return self._release()

    def finish(self) -> str:
        """End of the answer: what was held back, up to a stop string found in it."""
        if self._candidate is not None:
            return self._end()
        text, self._held, self._state = self._held, "", 0
        return text

    def _scan(self, end: int, *, is_armed: bool) -> bool:
        """Step over the character before `end`; True if a stop string is certain."""
        automaton = self._automaton
        state = self._state = automaton.step(self._state, self._held[end - 1])
        found = automaton.longest[state]
        if found is not None and is_armed:
            start = end - len(found)
            if self._candidate is None or start < self._candidate_start:
                self._candidate, self._candidate_start = found, start
        return self._candidate is not None and end - automaton.depth[state] >= self._candidate_start

    def _release(self) -> str:
        cut = len(self._held) - self._automaton.depth[self._state]
        text, self._held = self._held[:cut], self._held[cut:]
        self._candidate_start -= cut
        return text

    def _end(self) -> str:
        assert self._candidate is not None
        self.matched = self._candidate
        end = self._candidate_start + (len(self.matched) if self._keep else 0)
        text, self._held = self._held[:end], ""
        return text
