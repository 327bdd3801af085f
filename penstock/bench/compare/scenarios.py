"""What every contender is asked: lists of token ids with exact lengths, the same for all of one round.

Lengths depend on the scenario alone, ids on the seed and the round, so that a prefix cache cannot carry one
round into the next. Data only; `contender` sends it.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from penstock.bench.workload import LoadRequest, Workload, from_lists
from penstock.core.errors import CheckpointError, InvalidParameterError

LOWEST_ID: Final = 1_000
HIGHEST_ID: Final = 60_000
"""Ordinary ids in vocabularies of a usual size: single bytes are below, special tokens above."""
NAMES: Final = ("single", "prefill", "mixed", "shared", "long", "http-1", "http-8", "http-32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One thing to ask of every contender."""

    name: str
    load: Workload
    late: LoadRequest | None = None
    """A request that comes while those of `load` are being answered."""
    late_after_tokens: int = 0
    """It is sent once each answer of `load` has so many tokens."""

    @property
    def longest(self) -> int:
        """Most tokens of prompt and answer that any request needs."""
        requests = self.load.requests if self.late is None else (*self.load.requests, self.late)
        return max(request.num_prompt_tokens + request.num_output_tokens for request in requests)

    @property
    def num_streams(self) -> int:
        """Most requests in flight."""
        own = len(self.load.requests)
        return min(own, self.load.max_concurrency or own) + (self.late is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Where token ids come from, and how large everything is."""

    vocab_size: int
    seed: int = 0
    round_idx: int = 0
    scale: float = 1.0
    """In (0, 1]: factor on all lengths and counts; below 1 only to prove that everything works."""

    def ids(self, rng: random.Random, num_tokens: int) -> list[int]:
        """Random ordinary ids."""
        high = min(HIGHEST_ID, self.vocab_size * 9 // 10)
        low = min(LOWEST_ID, high // 4)
        return [rng.randrange(low, high) for _ in range(num_tokens)]

    def size(self, full: int, *, least: int = 2) -> int:
        """`full` scaled down, at least `least`."""
        return max(least, round(full * self.scale))

    def rng(self, name: str) -> random.Random:
        """For the ids of one scenario."""
        return random.Random(f"{name}-{self.seed}-{self.round_idx}")  # noqa: S311 - workload, no secret


def read_vocab_size(model: Path) -> int:
    """Ids of a checkpoint's vocabulary, from its config.

    Raises:
        CheckpointError: the config cannot be read, or does not say.
    """
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return int(config.get("text_config", config)["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"config.json of {model.name} has no vocab_size: {error!r}") from error


def make_scenario(name: str, *, draw: Draw) -> Scenario:
    """The scenario of that name.

    - `single`: one stream, prompt 128, answer 128.
    - `prefill`: one stream, prompt 512, answer 4.
    - `mixed`: 64 at once, prompts 32 to 512, answers 16 to 256.
    - `shared`: 64 at once whose first 512 tokens are the same, 32 of their own, answers 64.
    - `long`: 8 streams (prompt 64, answer 400); once each has 20 tokens a prompt of 4,096 arrives.
    - `http-N`: N users in a closed loop, prompts 64 to 256, answers 64.

    Raises:
        InvalidParameterError: there is no such scenario; the message lists them.
    """
    if name not in NAMES:
        raise InvalidParameterError(f"workload is {name!r}, it must be one of {', '.join(NAMES)}")
    if name.startswith("http-"):
        return _closed_loop(name, draw, num_users=int(name.removeprefix("http-")))
    return {"single": _single, "prefill": _prefill, "mixed": _mixed, "shared": _shared, "long": _long}[name](
        draw
    )


def _single(draw: Draw) -> Scenario:
    prompt = draw.ids(draw.rng("single"), draw.size(128))
    return Scenario(name="single", load=from_lists([prompt], output_lens=[draw.size(128)]))


def _prefill(draw: Draw) -> Scenario:
    prompt = draw.ids(draw.rng("prefill"), draw.size(512))
    return Scenario(name="prefill", load=from_lists([prompt], output_lens=[4]))


def _mixed(draw: Draw) -> Scenario:
    shape = random.Random("mixed-lengths")  # noqa: S311 - workload, no secret
    sizes = [(shape.randint(32, 512), shape.randint(16, 256)) for _ in range(draw.size(64))]
    rng = draw.rng("mixed")
    return Scenario(
        name="mixed",
        load=from_lists(
            [draw.ids(rng, draw.size(num_prompt)) for num_prompt, _ in sizes],
            output_lens=[draw.size(num_output) for _, num_output in sizes],
        ),
    )


def _shared(draw: Draw) -> Scenario:
    rng = draw.rng("shared")
    shared = draw.ids(rng, draw.size(512))
    count = draw.size(64)
    prompts = [shared + draw.ids(rng, draw.size(32)) for _ in range(count)]
    return Scenario(name="shared", load=from_lists(prompts, output_lens=[draw.size(64)] * count))


def _long(draw: Draw) -> Scenario:
    rng = draw.rng("long")
    streams = [draw.ids(rng, draw.size(64)) for _ in range(8)]
    late = LoadRequest(
        prompt=tuple(draw.ids(rng, draw.size(4096))),
        num_prompt_tokens=draw.size(4096),
        num_output_tokens=8,
    )
    return Scenario(
        name="long",
        load=from_lists(streams, output_lens=[draw.size(400, least=40)] * 8),
        late=late,
        late_after_tokens=20,
    )


def _closed_loop(name: str, draw: Draw, *, num_users: int) -> Scenario:
    each = 4 if num_users < 4 else 3 if num_users < 16 else 2
    shape = random.Random("http-lengths")  # noqa: S311 - workload, no secret
    sizes = [shape.randint(64, 256) for _ in range(num_users * each)]
    rng = draw.rng(name)
    prompts = [draw.ids(rng, draw.size(num_prompt)) for num_prompt in sizes]
    load = from_lists(prompts, output_lens=[draw.size(64)] * len(prompts), max_concurrency=num_users)
    return Scenario(name=name, load=load)
