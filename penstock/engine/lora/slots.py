"""Which adapters the running requests use: a bounded number of slots, each with one version of one adapter.

Pure: the scheduler asks it before it starts a request, and tells it when the request leaves. A slot whose
requests have all left stays bound, so that the next one finds it; the slot that was left longest ago is bound
anew when another adapter needs one. Weights come from a `Weights` port; where they lie is not known here.

```
  free --bind--> in use (1 request or more) -last leaves-> idle -next of the same-> in use
                                                           |
                                                           +-least recently left-> bound to another
```
"""

import enum
from collections import OrderedDict
from typing import Final, Protocol

NO_SLOT: Final = -1
"""Of a request for the base model."""


class Readiness(enum.Enum):
    """Where the weights of a version are."""

    READY = "ready"
    """In memory."""
    COMING = "coming"
    """Being read; ask again at the next step."""
    NO_ROOM = "no_room"
    """Memory is taken by adapters in use; ask again at the next step."""
    BROKEN = "broken"
    """The folder cannot be read any more."""


class Weights(Protocol):
    """What the slots ask of the store."""

    def want(self, revision: str) -> Readiness:
        """Where a version's weights are; starts to read them if they are not in memory."""
        ...

    def pin(self, revision: str) -> None:
        """Keep a version that is ready in memory until `unpin`."""
        ...

    def unpin(self, revision: str) -> None:
        """Undo one `pin`."""
        ...

    def is_registered(self, revision: str) -> bool:
        """True if some name stands for the version."""
        ...

    def discard(self, revision: str) -> None:
        """Forget a version that no name stands for and no request uses."""
        ...


class AdapterSlots:
    """See the module. Not thread-safe: the scheduler owns it."""

    def __init__(self, num_slots: int, *, weights: Weights) -> None:
        """Begin with every slot free.

        Args:
            num_slots: different adapters in one step, at least 1.
            weights: where they come from.
        """
        self._weights = weights
        self._free = list(range(num_slots - 1, -1, -1))
        self._slots: dict[str, int] = {}
        self._num_requests: dict[str, int] = {}
        self._num_users: dict[str, int] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._bindings: list[tuple[int, str]] = []
        self.num_slots: Final = num_slots

    @property
    def num_used(self) -> int:
        """Adapters of running requests."""
        return len(self._num_users)

    @property
    def num_waiting(self) -> int:
        """Adapters of requests none of which runs."""
        return len(self._num_requests) - len(self._num_users)

    def num_requests(self, revision: str) -> int:
        """Requests that have a version, running or waiting."""
        return self._num_requests.get(revision, 0)

    def enter(self, revision: str) -> None:
        """A request has been accepted: its version stays, whatever becomes of the name."""
        self._num_requests[revision] = self._num_requests.get(revision, 0) + 1

    def exit(self, revision: str) -> None:
        """A request that had entered is over, and has left its slot."""
        self._num_requests[revision] -= 1
        if not self._num_requests[revision]:
            del self._num_requests[revision]
            self.forget(revision)

    def can_take(self, revision: str) -> bool:
        """True if `take` would find a slot."""
        return revision in self._slots or bool(self._free or self._idle)

    def ask(self, revision: str) -> Readiness:
        """Where the weights are; what is bound to a slot is in memory.

        Without room in memory an idle slot is given up, if there is one.
        """
        if revision in self._slots:
            return Readiness.READY
        readiness = self._weights.want(revision)
        if readiness is Readiness.NO_ROOM and self._idle:
            self._drop(next(iter(self._idle)))
        return readiness

    def take(self, revision: str) -> int:
        """The slot of a version that is ready, for one more request; `can_take` was asked before."""
        if revision not in self._slots:
            self._bind(revision)
        self._num_users[revision] = self._num_users.get(revision, 0) + 1
        self._idle.pop(revision, None)
        return self._slots[revision]

    def _bind(self, revision: str) -> None:
        if not self._free:
            self._drop(next(iter(self._idle)))
        slot = self._free.pop()
        self._weights.pin(revision)
        self._slots[revision] = slot
        self._bindings.append((slot, revision))

    def _drop(self, revision: str) -> None:
        del self._idle[revision]
        slot = self._slots.pop(revision)
        self._free.append(slot)
        self._bindings.append((slot, ""))
        self._weights.unpin(revision)

    def leave(self, revision: str) -> None:
        """A request that took the slot has left the running set."""
        self._num_users[revision] -= 1
        if not self._num_users[revision]:
            del self._num_users[revision]
            self._idle[revision] = None

    def forget(self, revision: str) -> None:
        """Let a version go that no name stands for and no request uses; any other stays."""
        if revision in self._num_requests or self._weights.is_registered(revision):
            return
        if revision in self._idle:
            self._drop(revision)
        self._weights.discard(revision)

    def take_bindings(self) -> list[tuple[int, str]]:
        """Slots bound since the last call, as (slot, version) in order, for the runner; "" empties a slot."""
        bindings, self._bindings = self._bindings, []
        return bindings
