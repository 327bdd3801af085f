"""Adapters in a whole engine: each request gets its own version, alone or in company, whatever comes and goes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.core.errors import InvalidParameterError, NotFoundError
from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest, TokenDelta
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, LoraConfig, LoraModule, SchedulerConfig
from penstock.engine.core import EngineCore
from penstock.engine.lora.host import AdapterHost, LoadOrder, LoadOutcome
from tests.docs.tiny_model import make_tiny_adapter, make_tiny_model

PROMPT = [3 + (7 * i) % 90 for i in range(12)]
MAX_TOKENS = 6
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and three adapters."""
    path = tmp_path_factory.mktemp("lora")
    make_tiny_model(path / "model")
    for seed, name in enumerate(NAMES):
        make_tiny_adapter(path / name, seed=seed)
    return path


def build(
    folder: Path, names: tuple[str, ...] = NAMES, *, lora: dict[str, int] | None = None, num_blocks: int = 96
) -> EngineCore:
    modules = tuple(LoraModule(name=name, path=str(folder / name)) for name in names)
    return build_core(
        EngineConfig(
            model_path=str(folder / "model"),
            dtype="float32",
            kernels="reference",
            scheduler=SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=24),
            kv=KvConfig(block_size=4, num_blocks=num_blocks),
            lora=LoraConfig(enable_lora=True, modules=modules, **(lora or {})),
            max_model_len=48,
            num_threads=1,
            warmup=False,
        )
    )


def ask(
    core: EngineCore, name: str, request_id: str = "", *, n: int = 1, max_tokens: int = MAX_TOKENS
) -> None:
    params = SamplingParams(
        temperature=0 if n == 1 else 1.0, seed=5, n=n, max_tokens=max_tokens, ignore_eos=True
    )
    core.add(
        EngineRequest(
            request_id=RequestId(request_id or name or "base"),
            prompt_token_ids=list(PROMPT),
            params=params,
            adapter=name,
        )
    )


def run(core: EngineCore) -> Iterator[TokenDelta]:
    while core.has_work:
        yield from core.step().deltas


def tokens(core: EngineCore) -> dict[tuple[str, int], list[int]]:
    found: dict[tuple[str, int], list[int]] = {}
    for delta in run(core):
        assert delta.error is None, delta.error
        found.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
    return found


def host(core: EngineCore) -> AdapterHost:
    assert core.adapters is not None
    return core.adapters


def load(core: EngineCore, path: Path, name: str, *, is_replacing: bool = False) -> LoadOutcome:
    module = LoraModule(name=name, path=str(path), allow_links=False)
    host(core).begin_load(LoadOrder(question_id=1, module=module, is_replacing=is_replacing))
    while True:
        host(core).wait(1.0)
        host(core).poll()
        for outcome in host(core).take_outcomes():
            return outcome


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[int]]:
    """What each says when nobody else is there."""
    found = {}
    for name in ("", *NAMES):
        core = build(folder)
        ask(core, name)
        found[name] = tokens(core)[name or "base", 0]
    assert len({tuple(said) for said in found.values()}) == 4, "the adapters say the same"
    return found


@pytest.mark.parametrize(
    "lora",
    [{}, {"max_loras": 1, "max_cpu_loras": 1}, {"max_loras": 2, "max_cpu_loras": 2}],
    ids=["room for all", "one at a time", "two at a time"],
)
def test_a_mixed_batch_equals_each_alone_however_few_slots_there_are(
    folder: Path, alone: dict[str, list[int]], lora: dict[str, int]
) -> None:
    core = build(folder, lora=lora)
    for turn in range(2):
        for name in ("a", "", "b", "c"):
            ask(core, name, f"{name}{turn}")
    said = tokens(core)
    for turn in range(2):
        for name, expected in alone.items():
            assert said[f"{name}{turn}", 0] == expected
    assert len(host(core).store) <= lora.get("max_cpu_loras", 3)


def test_preempted_requests_say_the_same(folder: Path, alone: dict[str, list[int]]) -> None:
    core = build(folder, num_blocks=14)
    for name in ("a", "b", "", "c"):
        ask(core, name, max_tokens=20)
    num_preemptions, said = 0, dict[str, list[int]]()
    while core.has_work:
        output = core.step()
        num_preemptions += output.stats.num_preemptions
        for delta in output.deltas:
            said.setdefault(delta.request_id, []).extend(delta.token_ids)
    assert num_preemptions > 0
    for name, expected in alone.items():
        assert said[name or "base"][:MAX_TOKENS] == expected


def test_answers_of_one_request_share_their_adapter(folder: Path) -> None:
    core = build(folder)
    ask(core, "a", n=3)
    alone_3 = tokens(core)
    mixed = build(folder)
    ask(mixed, "b", n=3)
    ask(mixed, "a", n=3)
    assert {key: said for key, said in tokens(mixed).items() if key[0] == "a"} == alone_3


def test_the_prefix_cache_never_serves_one_adapters_blocks_to_another(folder: Path) -> None:
    core = build(folder)
    cached = {}
    for turn, name in enumerate(("a", "b", "", "a")):
        ask(core, name, f"{name}{turn}")
        cached[f"{name}{turn}"] = max(delta.num_cached_tokens for delta in run(core))
    assert cached == {"a0": 0, "b1": 0, "2": 0, "a3": 8}


def test_a_running_request_keeps_its_version_when_the_name_is_replaced_and_unloaded(
    folder: Path, alone: dict[str, list[int]]
) -> None:
    core = build(folder, ("a",))
    ask(core, "a", "old")
    core.step()
    assert load(core, folder / "b", "a", is_replacing=True).error is None
    ask(core, "a", "new")
    core.step()
    host(core).unload("a")
    with pytest.raises(NotFoundError):
        ask(core, "a", "late")
    said: dict[str, list[int]] = {"old": alone["a"][:1], "new": alone["b"][:1]}
    for delta in run(core):
        said[delta.request_id].extend(delta.token_ids)
    assert said["old"][-MAX_TOKENS + 2 :] == alone["a"][2:]
    assert said["new"][-MAX_TOKENS + 1 :] == alone["b"][1:]
    assert len(host(core).store) == 0
    assert host(core).store.num_bytes == 0


def test_a_refused_adapter_leaves_nothing_behind(
    folder: Path, alone: dict[str, list[int]], tmp_path: Path
) -> None:
    core = build(folder, ("a",))
    bad = make_tiny_adapter(tmp_path / "bad")
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    bytes_before = host(core).store.num_bytes
    outcome = load(core, bad, "bad")
    assert isinstance(outcome.error, InvalidParameterError)
    assert outcome.error.param == "use_dora"
    assert [report.name for report in host(core).reports()] == ["a"]
    assert host(core).store.num_bytes == bytes_before
    with pytest.raises(InvalidParameterError, match="load_inplace"):
        load(core, folder / "b", "a")
    ask(core, "")
    assert tokens(core)["base", 0] == alone[""]


def test_an_adapter_whose_files_have_changed_ends_its_requests_and_no_others(
    folder: Path, alone: dict[str, list[int]], tmp_path: Path
) -> None:
    core = build(folder, ("a",), lora={"max_loras": 1, "max_cpu_loras": 1})
    gone = make_tiny_adapter(tmp_path / "gone", seed=9)
    assert load(core, gone, "gone").error is None
    (gone / "adapter_config.json").write_text("{}")
    ask(core, "a", "first")  # needs the only place in memory
    assert tokens(core)["first", 0] == alone["a"]
    ask(core, "gone")
    ask(core, "", "base")
    ends = {delta.request_id: delta for delta in run(core) if delta.is_last}
    assert ends["base"].error is None
    error = ends["gone"].error
    assert error is not None
    assert error.code == "adapter_unavailable"


def test_an_engine_without_adapters_refuses_them(folder: Path) -> None:
    core = build_core(
        EngineConfig(model_path=str(folder / "model"), kernels="reference", dtype="float32", warmup=False)
    )
    with pytest.raises(InvalidParameterError, match="adapter"):
        ask(core, "a")
