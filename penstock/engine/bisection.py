"""Trace an exception to the members of a batch that cause it.

It knows nothing of models: `attempt` is any operation on a part of a batch that may be repeated. The runner
calls it for the forward pass and for sampling, the draft model for its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Member = TypeVar("Member")
Part = TypeVar("Part")


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit(Generic[Member]):
    """A member whose operation raises even when it is alone."""

    member: Member
    error: Exception


@dataclass(frozen=True, slots=True, kw_only=True)
class Isolated(Generic[Member, Part]):
    """A batch taken apart: what went well, in order, and who did not."""

    parts: list[Part]
    culprits: list[Culprit[Member]]


def _ignore(_error: Exception) -> None:
    """Let only the culprits be told."""


def isolate(
    members: Sequence[Member],
    *,
    attempt: Callable[[Sequence[Member]], Part],
    on_error: Callable[[Exception], None] = _ignore,
) -> Isolated[Member, Part]:
    """Run `attempt` on the whole batch, and on ever smaller halves of whatever raises.

    With c culprits among n members it makes at most about 2 * c * log2(n) + 1 attempts; a batch without
    a fault costs one. A fault that needs two members at once ends in halves that go well and blames nobody.

    Args:
        members: the batch, at least one.
        attempt: the operation; must be repeatable for any part of the batch.
        on_error: told of every attempt that raised, before the next one.

    Returns:
        Results of the largest parts that went well, in the order of the members, and the culprits.
    """
    try:
        return Isolated(parts=[attempt(members)], culprits=[])
    except Exception as error:  # noqa: BLE001  the edge of one request's fault: it is named and reported
        on_error(error)
        if len(members) == 1:
            return Isolated(parts=[], culprits=[Culprit(member=members[0], error=error)])
    middle = len(members) // 2
    first = isolate(members[:middle], attempt=attempt, on_error=on_error)
    second = isolate(members[middle:], attempt=attempt, on_error=on_error)
    return Isolated(parts=first.parts + second.parts, culprits=first.culprits + second.culprits)
