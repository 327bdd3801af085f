"""The same wrong request is refused at every door, and each refusal names the field as that door calls it."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from penstock import LLM, SamplingParams
from penstock.cli.batch import Batch
from penstock.cli.local_model import LoopThread, StepTotals, open_local_model
from penstock.cli.model_source import find_model
from penstock.core.errors import InvalidParameterError
from penstock.engine.config import EngineConfig, KvConfig
from penstock.gateway.catalog import Catalog
from penstock.observe.clock import SystemClock
from penstock.observe.metrics import Metrics
from penstock.server.app import make_app, make_services
from penstock.server.services import Services
from tests.docs.tiny_model import make_tiny_model

MAX_MODEL_LEN = 48
LONG = "word " * 200
STOPS = ["a", "b", "c", "d", "e"]


@dataclass(frozen=True, slots=True)
class Wrong:
    """A request that no door may let in."""

    field: str
    value: Any
    prompt: str = "Hi"
    chat_param: str = ""
    """Where chat completions call the field something else."""

    @property
    def fields(self) -> dict[str, Any]:
        return {} if self.field == "prompt" else {self.field: self.value}

    @property
    def chat_fields(self) -> dict[str, Any]:
        return {"logprobs": True, "top_logprobs": self.value} if self.field == "logprobs" else self.fields


TABLE = {
    "n": Wrong("n", 9),
    "temperature": Wrong("temperature", 3),
    "top_p": Wrong("top_p", 0),
    "stop": Wrong("stop", STOPS),
    "logprobs": Wrong("logprobs", 21, chat_param="top_logprobs"),
    "seed": Wrong("seed", 2**63),
    "empty prompt": Wrong("prompt", "", prompt="", chat_param="messages"),
    "long prompt": Wrong("prompt", LONG, prompt=LONG, chat_param="messages"),
}


@dataclass(frozen=True, slots=True)
class House:
    """One tiny model behind every door."""

    thread: LoopThread
    services: Services
    llm: LLM
    folder: Path

    def post(self, path: str, body: dict[str, Any]) -> str | None:
        """The field that a 400 names."""
        reply = self.thread.run(self._post(path, body))
        assert reply.status_code == 400, reply.text
        return reply.json()["error"]["param"]

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        transport = httpx.ASGITransport(app=make_app(self.services))
        async with httpx.AsyncClient(transport=transport, base_url="http://penstock") as http:
            return await http.post(path, json=body)

    def row(self, row: dict[str, Any]) -> str | None:
        """The field that the error row names."""
        source, target = self.folder / "in.jsonl", self.folder / "out.jsonl"
        source.write_text(json.dumps(row) + "\n")
        target.unlink(missing_ok=True)
        batch = Batch(self.services, source=source, target=target)
        self.thread.run(batch.run(Console(file=io.StringIO()), num_workers=1))
        return json.loads(target.read_text())["error"]["param"]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("model")
    source = find_model(str(make_tiny_model(folder / "tiny")))
    config = EngineConfig(
        model_path=str(source.path), max_model_len=MAX_MODEL_LEN, kv=KvConfig(num_blocks=32), num_threads=1
    )
    thread = LoopThread()
    local = thread.run(open_local_model(source, config, events=StepTotals()))
    catalog, clock = Catalog(), SystemClock()
    catalog.add(local.service, name=source.name)
    services = make_services(catalog, clock=clock, events=Metrics([source.name], clock=clock))
    with LLM(source.path, max_model_len=MAX_MODEL_LEN, num_kv_blocks=32, num_threads=1) as llm:
        yield House(thread, services, llm, folder)
    thread.run(local.close())
    thread.close()


def _chat(house: House, wrong: Wrong) -> str | None:
    turns = [{"role": "user", "content": wrong.prompt}] if wrong.prompt else []
    param = house.post("/v1/chat/completions", {"messages": turns, **wrong.chat_fields})
    return wrong.field if param == (wrong.chat_param or wrong.field) else param


def _completions(house: House, wrong: Wrong) -> str | None:
    return house.post("/v1/completions", {"prompt": wrong.prompt, **wrong.fields})


def _plain(house: House, wrong: Wrong) -> str | None:
    return house.post("/generate", {"prompt": wrong.prompt, **wrong.fields})


def _row(house: House, wrong: Wrong) -> str | None:
    return house.row({"prompt": wrong.prompt, **wrong.fields})


def _llm(house: House, wrong: Wrong) -> str | None:
    with pytest.raises(InvalidParameterError) as caught:
        house.llm.generate(wrong.prompt, SamplingParams(**wrong.fields))
    return caught.value.param


DOORS: dict[str, Callable[[House, Wrong], str | None]] = {
    "chat": _chat,
    "completions": _completions,
    "plain": _plain,
    "run": _row,
    "LLM": _llm,
}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("door", DOORS)
def test_the_same_wrong_request_is_refused_at_every_door(house: House, door: str, name: str) -> None:
    """Doors that do not have a field refuse it by its name too."""
    assert DOORS[door](house, TABLE[name]) == TABLE[name].field


@pytest.mark.parametrize("door", ["/v1/completions", "/generate"])
def test_a_request_of_the_table_without_its_fault_is_answered(house: House, door: str) -> None:
    """So that the table is of what it says."""
    reply = house.thread.run(house._post(door, {"prompt": "Hi", "temperature": 1, "max_tokens": 2}))
    assert reply.status_code == 200, reply.text
