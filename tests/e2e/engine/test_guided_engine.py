"""Grammars through the loop: compiled beside running answers, refused before acceptance, aborted, resubmitted."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from penstock.core.errors import InvalidParameterError
from penstock.core.grammar import GrammarKind, GrammarSpec
from penstock.core.ids import ModelName, RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from penstock.engine.grammar.compiler import GrammarCompiler
from penstock.engine.in_process import InProcessEngine
from penstock.engine.supervisor import SubprocessEngine
from penstock.models.embedded_model import embedded_path
from penstock.text.tokenizer import Tokenizer
from tests.e2e.engine.test_engine_process import Restarts, make_engine

TOKENIZER = Tokenizer.from_folder(embedded_path())
DIGITS = GrammarSpec(kind=GrammarKind.REGEX, source="[0-9]{3}-[0-9]{2}")
PERSON = GrammarSpec.of_json(
    GrammarKind.JSON_SCHEMA,
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "number_of_children": {"enum": [0, 1, 2]},
        },
        "required": ["name", "number_of_children"],
        "additionalProperties": False,
    },
)


def request(name: str, grammar: GrammarSpec | None, **params: Any) -> EngineRequest:
    sampling = SamplingParams(**({"temperature": 0, "max_tokens": 60} | params))
    return EngineRequest(
        request_id=RequestId(name),
        prompt_token_ids=TOKENIZER.encode("The answer:", add_special_tokens=True),
        params=sampling,
        eos_token_ids=TOKENIZER.eos_token_ids,
        grammar=grammar,
    )


@pytest.fixture
async def engine() -> AsyncIterator[InProcessEngine]:
    config = EngineConfig(
        model_path=str(embedded_path()), kv=KvConfig(num_blocks=512), warmup=False, num_threads=1
    )
    engine = InProcessEngine(build_core(config), name=ModelName("m"), events=Restarts())
    yield engine
    await engine.close()


async def read(
    engine: InProcessEngine | SubprocessEngine, wanted: EngineRequest
) -> tuple[list[str], list[Any]]:
    """Texts of the answers, and their ends."""
    tokens: dict[int, list[int]] = {}
    ends = []
    async for delta in await engine.generate(wanted):
        tokens.setdefault(delta.index, []).extend(delta.token_ids)
        if delta.finish_reason:
            ends.append(delta.finish_reason.value)
    return [TOKENIZER.decode(tokens[index]) for index in sorted(tokens)], ends


async def test_answers_with_and_without_grammars_share_a_batch(engine: InProcessEngine) -> None:
    wanted = [
        request("a", PERSON),
        request("b", DIGITS, n=3, temperature=1.0, seed=1),
        request("c", None, max_tokens=20),
        request("d", PERSON, temperature=1.5, seed=3),
    ]
    a, b, c, d = await asyncio.gather(*(read(engine, each) for each in wanted))
    assert all(set(json.loads(text)) == {"name", "number_of_children"} for text in (*a[0], *d[0]))
    assert all(len(text) == 6 and text[3] == "-" for text in b[0])
    assert len(set(b[0])) == 3
    assert {*a[1], *b[1], *d[1]} == {"stop"}
    assert c == await read(engine, request("again", None, max_tokens=20))


async def test_a_bad_grammar_is_refused_before_acceptance_and_no_running_answer_notices(
    engine: InProcessEngine,
) -> None:
    running = await engine.generate(request("long", None, max_tokens=200, ignore_eos=True))
    await anext(running)
    bad = GrammarSpec(kind=GrammarKind.REGEX, source="(")
    with pytest.raises(InvalidParameterError, match="unclosed group"):
        await engine.generate(request("bad", bad))
    assert sum([len(delta.token_ids) async for delta in running]) == 199


async def test_steps_go_on_while_a_grammar_compiles_and_a_client_that_leaves_is_forgotten(
    engine: InProcessEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, began = threading.Event(), threading.Event()
    compile_ = GrammarCompiler.compile

    def slow(self: GrammarCompiler, spec: GrammarSpec) -> Any:
        began.set()
        gate.wait(20)
        return compile_(self, spec)

    monkeypatch.setattr(GrammarCompiler, "compile", slow)
    leaving = asyncio.create_task(engine.generate(request("leaving", DIGITS)))
    staying = asyncio.create_task(read(engine, request("staying", DIGITS)))
    await asyncio.to_thread(began.wait, 20)
    assert len((await read(engine, request("other", None, max_tokens=30, ignore_eos=True)))[0][0]) > 30
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    gate.set()
    assert (await staying)[1] == ["stop"]
    assert await engine.requests() == []


async def test_a_jump_gives_the_tokens_that_drawing_gives() -> None:
    """Jump-forward changes the number of steps and nothing else."""
    found = []
    for jumps in (True, False):
        config = EngineConfig(
            model_path=str(embedded_path()),
            kv=KvConfig(num_blocks=512),
            scheduler=SchedulerConfig(enable_jump_forward=jumps),
            warmup=False,
            num_threads=1,
        )
        core = build_core(config)
        for index, temperature in enumerate((0.0, 1.0)):
            params = {"temperature": temperature, "seed": 5, "repetition_penalty": 1.2, "logprobs": 0}
            core.add(request(str(index), PERSON, **params))
        tokens: dict[str, list[int]] = {"0": [], "1": []}
        steps = 0
        while core.has_work:
            steps += 1
            for delta in core.step().deltas:
                tokens[delta.request_id] += delta.token_ids
                assert len(delta.logprobs or ()) == len(delta.token_ids)
        found.append((tokens, steps))
    (with_jumps, few), (without, many) = found
    assert with_jumps == without
    assert few < 0.7 * many


async def test_an_engine_process_that_sleeps_wakes_for_a_compiled_grammar() -> None:
    engine = make_engine(embedded_path(), Restarts())
    await engine.start()
    try:
        texts, ends = await asyncio.wait_for(read(engine, request("a", DIGITS)), 20)
        with pytest.raises(InvalidParameterError, match="cannot be enforced"):
            await engine.generate(request("b", GrammarSpec(kind=GrammarKind.REGEX, source="[")))
    finally:
        await engine.close()
    assert (len(texts[0]), ends) == (6, ["stop"])
