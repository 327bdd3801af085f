"""A fault in the draft model's pass or draw costs the one sequence its guesses, and nobody an answer."""

from pathlib import Path
from typing import Any

import pytest

from penstock.engine.config import SpeculativeConfig
from penstock.engine.core import EngineCore
from tests.oracle.checkpoints import tiny_checkpoint
from tests.property.spec.test_same_answers_with_drafts import VOCAB, answer, make_core, make_requests

CULPRIT = "2"
"""Id of the request that raises; its two answers are two sequences."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("faults") / "llama", vocab_size=VOCAB)


def culprits(core: EngineCore) -> set[int]:
    """Numbers of its sequences, as far as they are known now."""
    return {
        seq.seq_id
        for group in core.scheduler._roster.open_groups
        if group.request.request_id == CULPRIT
        for seq in group.sequences
    }


def raising(core: EngineCore, whom: Any, times: list[int]) -> Any:  # Any: of either method
    def wrapped(first: Any, *args: Any, **kwargs: Any) -> Any:
        entries = kwargs.get("specs") or first
        if {each.seq_id for each in entries} & culprits(core):
            times.append(len(entries))
            raise RuntimeError("injected")
        return whom(first, *args, **kwargs)

    return wrapped


@pytest.mark.parametrize("place", ["pass", "draw"])
def test_one_sequences_fault_in_the_draft_stays_in_it(path: Path, place: str, monkeypatch: Any) -> None:
    requests = make_requests(1, 6)
    expected, _ = answer(make_core(path, None), requests)
    speculative = SpeculativeConfig(method="draft_model", model=str(path), num_speculative_tokens=4)
    core = make_core(path, speculative)
    drafter = core.ranks.runner._drafter  # type: ignore[attr-defined]  # the one of this process
    times: list[int] = []
    if place == "pass":
        monkeypatch.setattr(drafter._passes, "run", raising(core, drafter._passes.run, times))
    else:
        own = drafter._sampler = Wrapped(drafter._sampler)
        own.sample = raising(core, own.sample, times)
    drafted, (num_drafts, num_accepted, _) = answer(core, requests)
    assert drafted == expected
    assert num_accepted > 0.5 * num_drafts > 0
    assert times.count(1) == 2, "alone once for each of its two sequences, and never asked again"


class Wrapped:
    """A sampler whose `sample` may be replaced; the runner goes on with its own."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.sample = sampler.sample
