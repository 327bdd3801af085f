"""What is to be sent: a list of requests with their prompts, lengths and times, and how many may run at once.

Made here from explicit lists (`from_lists`, for other benchmarks) or by `prompts` from distributions. It is
data only: `load` sends it, `client` puts one request on the wire.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from penstock.bench.target import check_body
from penstock.core.errors import InvalidParameterError

Prompt = tuple[int, ...] | str
"""Token ids where the server takes them, else text."""
MAX_REQUESTS: Final = 100_000
MAX_TOKENS: Final = 100_000_000
"""Prompt and answer tokens of a workload: times of all pieces are kept until the report, 8 bytes each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """One request of a workload."""

    prompt: Prompt
    num_prompt_tokens: int
    """As asked for; what the server counted is in the record."""
    num_output_tokens: int
    """Asked as `max_tokens`, at least 1."""
    arrival_s: float = 0.0
    """Seconds after the start when it is due; counts in an open loop only."""
    body: dict[str, object] = field(default_factory=dict)
    """Fields of its own, over those of the target; e.g. another `temperature`; none of `FIXED_FIELDS`."""

    def __post_init__(self) -> None:
        check_body(self.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests in the order of their arrival.

    Raises:
        InvalidParameterError: nothing to send, too much, or times that go back.
    """

    requests: tuple[LoadRequest, ...]
    is_open_loop: bool = False
    """True: each is sent when it is due, and its latency counts from then. False: each of `max_concurrency`
    users sends its next request when the last one has ended; `arrival_s` is not looked at."""
    max_concurrency: int | None = None
    """Most requests in flight, at least 1; None is all of them. In an open loop a request that must wait for
    a place waits at its own cost: the wait is in its latency."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.requests) <= MAX_REQUESTS:
            raise InvalidParameterError(f"{len(self.requests)} requests, there must be 1 to {MAX_REQUESTS}")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise InvalidParameterError(
                f"max_concurrency is {self.max_concurrency}, it must be at least 1", param="max_concurrency"
            )
        num_tokens = sum(r.num_prompt_tokens + r.num_output_tokens for r in self.requests)
        if num_tokens > MAX_TOKENS:
            raise InvalidParameterError(f"{num_tokens} tokens in all, there must be at most {MAX_TOKENS}")
        times = [request.arrival_s for request in self.requests]
        if times[0] < 0 or any(late < early for early, late in itertools.pairwise(times)):
            raise InvalidParameterError("arrival times go back")

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens asked for, all requests together."""
        return sum(request.num_prompt_tokens for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        """Answer tokens asked for, all requests together."""
        return sum(request.num_output_tokens for request in self.requests)


def from_lists(
    prompts: Sequence[Sequence[int] | str],
    *,
    output_lens: Sequence[int],
    arrival_s: Sequence[float] | None = None,
    max_concurrency: int | None = None,
) -> Workload:
    """A workload from explicit lists, for benchmarks that have their own prompts.

    Args:
        prompts: token ids or text, one per request.
        output_lens: tokens to generate, one per request.
        arrival_s: seconds after the start, one per request, never going back; makes it an open loop. None
            is a closed loop.
        max_concurrency: most requests in flight; None is all at once.

    Raises:
        InvalidParameterError: the lists differ in length, or the workload is out of its limits.
    """
    due_s = arrival_s if arrival_s is not None else [0.0] * len(prompts)
    if not len(prompts) == len(output_lens) == len(due_s):
        raise InvalidParameterError(
            f"{len(prompts)} prompts, {len(output_lens)} output lengths and {len(due_s)} arrival times, "
            "there must be as many of each"
        )
    requests = (
        _request(prompt, output_len=output_len, due_s=due)
        for prompt, output_len, due in zip(prompts, output_lens, due_s, strict=True)
    )
    return Workload(
        requests=tuple(requests), is_open_loop=arrival_s is not None, max_concurrency=max_concurrency
    )


def _request(prompt: Sequence[int] | str, *, output_len: int, due_s: float) -> LoadRequest:
    is_text = isinstance(prompt, str)
    return LoadRequest(
        prompt=prompt if isinstance(prompt, str) else tuple(prompt),
        num_prompt_tokens=0 if is_text else len(prompt),
        num_output_tokens=output_len,
        arrival_s=due_s,
    )
