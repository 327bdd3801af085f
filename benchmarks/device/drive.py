"""Drives an engine in this process, step by step, and times what it does."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd import DeviceType

from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.core import EngineCore

SETTLE_STEPS = 2
"""Decode steps after the last prompt that are not counted."""


def random_prompt(rng: random.Random, *, num_tokens: int, vocab: int) -> list[int]:
    """Ids below the last tenth of the vocabulary, where special tokens are."""
    return [rng.randrange(vocab * 9 // 10) for _ in range(num_tokens)]


@dataclass(slots=True)
class Answers:
    """What came out of the engine so far."""

    token_ids: dict[str, list[int]] = field(default_factory=dict)
    num_tokens: int = 0

    def step(self, core: EngineCore) -> None:
        """One step of the engine."""
        for delta in core.step().deltas:
            assert delta.error is None, delta.error
            self.token_ids.setdefault(delta.request_id, []).extend(delta.token_ids)
            self.num_tokens += len(delta.token_ids)


def submit(core: EngineCore, name: str, prompt: list[int], params: SamplingParams) -> None:
    """Queue a request."""
    core.add(EngineRequest(request_id=RequestId(name), prompt_token_ids=prompt, params=params))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTimes:
    """Steps that only decode."""

    batch: int
    step_ms: float
    """Wall time of a step, mean over all that were counted."""
    tokens_per_s: float


def time_decodes(
    core: EngineCore, *, batch: int, prompt_tokens: int, steps: int, seed: int = 0, name: str = "d"
) -> DecodeTimes:
    """Fill the engine with `batch` answers and time `steps` steps in which all of them go on."""
    rng, answers = random.Random(seed), Answers()
    params = greedy(_enough_tokens(batch, prompt_tokens=prompt_tokens, steps=steps))
    for idx in range(batch):
        prompt = random_prompt(rng, num_tokens=prompt_tokens, vocab=core.info.vocab_size)
        submit(core, f"{name}{idx}", prompt, params)
    while len(answers.token_ids) < batch:
        answers.step(core)
    for _ in range(SETTLE_STEPS):
        answers.step(core)
    before, began_s = answers.num_tokens, time.perf_counter()
    for _ in range(steps):
        answers.step(core)
    wall_s = time.perf_counter() - began_s
    gained = answers.num_tokens - before
    assert gained == batch * steps or core.is_async, (gained, batch, steps)
    drain(core, answers)
    return DecodeTimes(batch=batch, step_ms=wall_s / steps * 1e3, tokens_per_s=gained / wall_s)


def greedy(max_tokens: int) -> SamplingParams:
    """So many tokens, the likeliest each."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def _enough_tokens(batch: int, *, prompt_tokens: int, steps: int) -> int:
    """So that who was first goes on while the last prompts are computed, and through all steps that count."""
    return steps + 2 * SETTLE_STEPS + 4 + batch * prompt_tokens // 2048


def drain(core: EngineCore, answers: Answers) -> None:
    """Run until nothing is left."""
    while core.has_work:
        answers.step(core)


def run_all(
    core: EngineCore, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
) -> tuple[float, Answers]:
    """Seconds for all requests, queued at once, and their answers."""
    answers = Answers()
    began_s = time.perf_counter()
    for idx, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
        submit(core, str(idx), prompt, param)
    drain(core, answers)
    return time.perf_counter() - began_s, answers


def record_all_graphs(core: EngineCore) -> int:
    """Do what an idle engine does, to its end; returns how many recordings were made."""
    made = 0
    while core.prepare():
        made += 1
    return made


def busy_share(core: EngineCore, *, batch: int, prompt_tokens: int, steps: int) -> float:
    """Share of the wall time of decode steps in which a kernel or copy runs on the device, by CUPTI."""
    rng, answers = random.Random(1), Answers()
    params = greedy(_enough_tokens(batch, prompt_tokens=prompt_tokens, steps=steps))
    for idx in range(batch):
        prompt = random_prompt(rng, num_tokens=prompt_tokens, vocab=core.info.vocab_size)
        submit(core, f"b{idx}", prompt, params)
    while len(answers.token_ids) < batch:
        answers.step(core)
    for _ in range(SETTLE_STEPS):
        answers.step(core)
    activities = [
        torch.profiler.ProfilerActivity.CUDA
        if torch.cuda.is_available()
        else torch.profiler.ProfilerActivity.CPU
    ]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            answers.step(core)
    drain(core, answers)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events() or []
        if event.time_range.end > event.time_range.start and event.device_type == DeviceType.CUDA
    )
    return covered(spans)


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of sorted spans over the length from the first to the last; 0 for none."""
    if not spans:
        return 0.0
    busy, (start, end) = 0.0, spans[0]
    for first, last in spans[1:]:
        if first > end:
            busy += end - start
            start, end = first, last
        end = max(end, last)
    busy += end - start
    return busy / (max(last for _, last in spans) - spans[0][0])
