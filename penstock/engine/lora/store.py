"""The weights of adapters in memory: a bounded cache over folders on disk, read by a thread of its own.

The step loop asks `want` and never waits: what is not in memory is read beside it. Least recently used
versions leave when count or bytes are at their limit; those that are pinned (bound to a slot) stay.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from penstock.core.errors import InvalidParameterError, PenstockError
from penstock.engine.lora.adapter import Adapter
from penstock.engine.lora.registry import AdapterVersion
from penstock.engine.lora.slots import Readiness
from penstock.kernels.adapters import AdapterWeights

MAX_READS: Final = 2
"""Folders being read at once, and their memory set aside."""

log = logging.getLogger("penstock.engine.lora")


@dataclass(slots=True, kw_only=True)
class Entry:
    """A version in memory."""

    weights: AdapterWeights
    num_pins: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadAdapter:
    """What a folder was found to hold, and its weights in the form of the kernels."""

    version: AdapterVersion
    weights: AdapterWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """Bounds of the cache."""

    max_adapters: int
    max_bytes: int


class AdapterStore:
    """See the module; `slots.Weights`. Used from the step loop's thread only."""

    def __init__(
        self,
        limits: StoreLimits,
        *,
        read: Callable[[AdapterVersion], ReadAdapter],
        is_named: Callable[[str], bool],
    ) -> None:
        """Begin empty.

        Args:
            limits: bounds of what is kept.
            read: reads a known version again; called in the thread.
            is_named: whether some name stands for a revision.
        """
        self._limits = limits
        self._read = read
        self._is_named = is_named
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="penstock-lora")
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._versions: dict[str, AdapterVersion] = {}
        self._reads: dict[str, Future[ReadAdapter]] = {}
        self._broken: set[str] = set()
        self.num_bytes = 0
        """Of what is in memory."""
        self.num_reads = 0
        """Versions read again so far because they were not in memory."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, revision: str) -> bool:
        return revision in self._entries

    def submit(self, job: Callable[[], ReadAdapter]) -> "Future[ReadAdapter]":
        """Run an operator's order in the thread."""
        return self._thread.submit(job)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    # -- versions ------------------------------------------------------------------------------------------

    def know(self, version: AdapterVersion) -> None:
        """Remember where a version can be read."""
        self._versions[version.revision] = version
        self._broken.discard(version.revision)

    def add(self, read: ReadAdapter) -> None:
        """Keep a version that was just read, if there is room for it."""
        self.know(read.version)
        revision = read.version.revision
        if revision in self._entries:
            self._entries.move_to_end(revision)
        elif self._make_room(read.weights.num_bytes):
            self._entries[revision] = Entry(weights=read.weights)
            self.num_bytes += read.weights.num_bytes

    def version(self, revision: str) -> AdapterVersion:
        """What is known of a version, by its latest reading."""
        return self._versions[revision]

    def weights(self, revision: str) -> AdapterWeights:
        """Of a version that is in memory."""
        return self._entries[revision].weights

    def is_registered(self, revision: str) -> bool:
        """As `slots.Weights`."""
        return self._is_named(revision)

    def discard(self, revision: str) -> None:
        """As `slots.Weights`."""
        self._versions.pop(revision, None)
        self._broken.discard(revision)
        entry = self._entries.get(revision)
        if entry is not None and not entry.num_pins:
            self._drop(revision)

    # -- as slots.Weights ----------------------------------------------------------------------------------

    def want(self, revision: str) -> Readiness:
        """As `slots.Weights`."""
        if revision in self._entries:
            self._entries.move_to_end(revision)
            return Readiness.READY
        if revision in self._broken or revision not in self._versions:
            return Readiness.BROKEN
        if revision in self._reads or len(self._reads) >= MAX_READS:
            return Readiness.COMING
        version = self._versions[revision]
        if not self._make_room(version.num_bytes):
            return Readiness.NO_ROOM
        self._reads[revision] = self._thread.submit(self._read, version)
        return Readiness.COMING

    def pin(self, revision: str) -> None:
        """As `slots.Weights`."""
        self._entries[revision].num_pins += 1

    def unpin(self, revision: str) -> None:
        """As `slots.Weights`."""
        self._entries[revision].num_pins -= 1
        if revision not in self._versions:
            self._drop(revision)

    # -- reading -------------------------------------------------------------------------------------------

    @property
    def is_reading(self) -> bool:
        """True while a folder is read for a request."""
        return bool(self._reads)

    @property
    def reads(self) -> "list[Future[ReadAdapter]]":
        """Those under way."""
        return list(self._reads.values())

    def poll(self) -> None:
        """Take in what has been read since the last call."""
        for revision, future in list(self._reads.items()):
            if future.done():
                del self._reads[revision]
                self._take_in(revision, future)

    def _take_in(self, revision: str, future: "Future[ReadAdapter]") -> None:
        error = future.exception()
        if revision not in self._versions:
            return
        if error is not None:
            log.error("an adapter cannot be read again: %s", _text_of(error))
            self._broken.add(revision)
            return
        self.num_reads += 1
        self.add(future.result())

    def _make_room(self, num_bytes: int) -> bool:
        """Drop what was not used for longest until one more fits; False if what is pinned leaves no room."""
        while not self._fits(num_bytes):
            victim = next((key for key, entry in self._entries.items() if not entry.num_pins), None)
            if victim is None:
                return False
            self._drop(victim)
        return True

    def _fits(self, num_bytes: int) -> bool:
        coming = sum(self._versions[key].num_bytes for key in self._reads if key in self._versions)
        is_few = len(self._entries) + len(self._reads) < self._limits.max_adapters
        return is_few and self.num_bytes + coming + num_bytes <= self._limits.max_bytes

    def _drop(self, revision: str) -> None:
        self.num_bytes -= self._entries.pop(revision).weights.num_bytes


def _text_of(error: BaseException) -> str:
    """What the log may say: our own words, or the error's kind."""
    return error.message if isinstance(error, PenstockError) else type(error).__name__


def check_same(version: AdapterVersion, adapter: Adapter) -> None:
    """Refuse a folder whose files are not those that were registered.

    Raises:
        InvalidParameterError: they have changed.
    """
    if adapter.revision != version.revision:
        raise InvalidParameterError(
            "adapter: the files have changed since they were loaded", code="invalid_adapter"
        )
