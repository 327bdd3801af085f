"""Reads a server's metrics while it works: how many requests run at once, and how full their memory is."""

import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

PERIOD_S: Final = 0.1
RUNNING: Final = "penstock_num_requests_running"
OWNED: Final = "penstock_kv_cache_owned_slot_seconds_total"
USED: Final = "penstock_kv_cache_used_slot_seconds_total"
COMPUTED: Final = "penstock_prompt_tokens_computed_total"


def read_metrics(url: str) -> dict[str, float]:
    """The sum over labels of each sample at `url`/metrics; empty if nobody answers."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as reply:  # noqa: S310 - our own child
            text = reply.read().decode()
    except (urllib.error.URLError, OSError):
        return {}
    return parse_metrics(text)


def parse_metrics(text: str) -> dict[str, float]:
    """Samples of Prometheus's text form by name, labels summed."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("#") or " " not in line:
            continue
        head, value = line.rsplit(" ", 1)
        name = head.split("{", 1)[0]
        found[name] = found.get(name, 0.0) + float(value)
    return found


class Gauges:
    """Within its block, asks ten times a second.

    Args:
        read: returns the samples of now.
    """

    def __init__(self, read: Callable[[], dict[str, float]]) -> None:
        self._read = read
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gauges", daemon=True)
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self.most_running = 0.0
        """Most requests that ran at once."""

    def __enter__(self) -> Self:
        self._first = self._read()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._last = self._read()

    def grown(self, name: str) -> float:
        """By how much a counter grew within the block."""
        return self._last.get(name, 0.0) - self._first.get(name, 0.0)

    @property
    def kv_efficiency(self) -> float | None:
        """Slots that held a token over slots that requests owned, averaged over time; None if none was."""
        owned = self.grown(OWNED)
        return self.grown(USED) / owned if owned > 0 else None

    def _watch(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self.most_running = max(self.most_running, self._read().get(RUNNING, 0.0))
