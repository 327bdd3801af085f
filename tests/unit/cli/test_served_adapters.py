"""Names of adapters in the catalog follow the engine, and an order over HTTP names a folder, never a path."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from penstock.cli.adapters import ServedAdapters
from penstock.core.errors import InvalidParameterError, NotFoundError, StartupError
from penstock.core.ids import ModelName
from penstock.core.tokens import AdapterReport
from penstock.engine.config import LoraModule
from penstock.gateway.catalog import Catalog
from penstock.observe.clock import SystemClock
from tests.fakes.model_client import FakeModelClient


class FakeEngine:
    """Loads whatever it is told to, but for folders called `broken`."""

    def __init__(self) -> None:
        self.loaded: dict[str, LoraModule] = {}
        self.is_asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def adapters(self) -> Sequence[AdapterReport]:
        return [self._report(module) for module in self.loaded.values()]

    async def load_adapter(self, module: LoraModule, *, is_replacing: bool) -> AdapterReport:
        if module.path.endswith("broken"):
            raise InvalidParameterError("adapter: r is 99, max_lora_rank is 64", param="r")
        await self._pass_gate()
        assert is_replacing or module.name not in self.loaded
        self.loaded[module.name] = module
        return self._report(module)

    async def unload_adapter(self, name: str) -> AdapterReport:
        await self._pass_gate()
        return self._report(self.loaded.pop(name))

    async def _pass_gate(self) -> None:
        self.is_asked.set()
        await self.gate.wait()

    @staticmethod
    def _report(module: LoraModule) -> AdapterReport:
        return AdapterReport(
            name=module.name,
            revision="r",
            rank=4,
            num_bytes=1,
            is_in_memory=True,
            num_requests=0,
            path=module.path,
        )


def make(folder: Path | None) -> tuple[ServedAdapters, FakeEngine, Catalog]:
    catalog, engine, model = Catalog(), FakeEngine(), FakeModelClient()
    catalog.add(model, name=model.name)
    return (
        ServedAdapters(engine, model, catalog=catalog, clock=SystemClock(), folder=folder),
        engine,
        catalog,
    )


async def test_a_loaded_adapter_is_listed_under_its_model_until_it_is_unloaded(tmp_path: Path) -> None:
    (tmp_path / "french-v1").mkdir()
    adapters, engine, catalog = make(tmp_path)
    await adapters.load("french", folder="french-v1", is_replacing=False)
    card = catalog.card(ModelName("french"))
    assert (card.name, card.parent, card.root) == ("french", FakeModelClient().name, "french-v1")
    assert engine.loaded["french"].allow_links is False
    await adapters.unload("french")
    with pytest.raises(NotFoundError):
        catalog.resolve(ModelName("french"))
    with pytest.raises(NotFoundError):
        await adapters.unload("french")


async def test_an_order_whose_client_leaves_is_carried_out_so_that_catalog_and_engine_agree(
    tmp_path: Path,
) -> None:
    (tmp_path / "french-v1").mkdir()
    adapters, engine, catalog = make(tmp_path)
    for is_loaded, order in (
        (True, lambda: adapters.load("french", folder="french-v1", is_replacing=False)),
        (False, lambda: adapters.unload("french")),
    ):
        engine.gate.clear()
        engine.is_asked.clear()
        client = asyncio.create_task(order())
        await engine.is_asked.wait()
        client.cancel()
        await asyncio.wait([client])
        assert client.cancelled()
        engine.gate.set()
        with pytest.raises(NotFoundError):
            await adapters.unload("nobody")  # orders are carried out one after the other
        assert ("french" in engine.loaded) is is_loaded
        assert catalog.has_adapter("french") is is_loaded


@pytest.mark.parametrize(
    "folder", ["../other", "/etc", "a/b", "", ".", "..", ".hidden", "link", "missing", "a\x00b", "x" * 200]
)
async def test_what_is_no_plain_folder_name_is_refused(folder: str, tmp_path: Path) -> None:
    inside = tmp_path / "adapters"
    (inside / "real").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (inside / "link").symlink_to(inside / "real")
    adapters, engine, _ = make(inside)
    with pytest.raises(InvalidParameterError) as caught:
        await adapters.load("name", folder=folder, is_replacing=False)
    assert caught.value.param == "lora_path"
    assert not engine.loaded


async def test_without_a_folder_of_adapters_nothing_is_loaded(tmp_path: Path) -> None:
    adapters, _, _ = make(None)
    with pytest.raises(InvalidParameterError, match="lora_dir"):
        await adapters.load("name", folder="real", is_replacing=False)


async def test_a_models_name_and_a_malformed_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    adapters, engine, _ = make(tmp_path)
    for name in (FakeModelClient().name, "a b", ""):
        with pytest.raises(InvalidParameterError) as caught:
            await adapters.load(name, folder="real", is_replacing=False)
        assert caught.value.param == "lora_name"
    assert not engine.loaded


async def test_what_the_engine_refuses_does_not_reach_the_catalog(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    adapters, _, catalog = make(tmp_path)
    with pytest.raises(InvalidParameterError, match="max_lora_rank"):
        await adapters.load("name", folder="broken", is_replacing=False)
    assert not catalog.has_adapter("name")


def test_an_adapter_of_the_command_line_may_not_bear_the_models_name() -> None:
    adapters, engine, _ = make(None)
    report = engine._report(LoraModule(name=FakeModelClient().name, path="x"))
    with pytest.raises(StartupError, match="lora_modules"):
        adapters.show_at_start((report,))
