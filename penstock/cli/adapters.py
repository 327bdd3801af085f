"""The adapters of one served model: its engine has their weights, the catalog their names.

Names enter the catalog when the engine has them, and leave it before the engine forgets them. An order over
HTTP names a folder inside the operator's own (`lora_dir`), never a path.
"""

import asyncio
import re
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Final, Protocol

from penstock.core.errors import InvalidParameterError, StartupError, no_such_adapter
from penstock.core.ids import ModelName
from penstock.core.ports import Clock, ModelClient
from penstock.core.tokens import AdapterReport
from penstock.engine.config import LoraModule
from penstock.gateway.catalog import Catalog
from penstock.text.adapter_client import AdapterClient

FOLDER_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


class AdapterEngine(Protocol):
    """The engine's part; `SubprocessEngine` and `InProcessEngine` fit."""

    async def adapters(self) -> Sequence[AdapterReport]:
        """All adapters, oldest name first."""
        ...

    async def load_adapter(self, module: LoraModule, *, is_replacing: bool) -> AdapterReport:
        """Read, check and register an adapter."""
        ...

    async def unload_adapter(self, name: str) -> AdapterReport:
        """Forget an adapter's name."""
        ...


class ServedAdapters:
    """See the module; a `core.ports.AdapterAdmin`."""

    def __init__(
        self, engine: AdapterEngine, base: ModelClient, *, catalog: Catalog, clock: Clock, folder: Path | None
    ) -> None:
        """Join the parts.

        Args:
            engine: has the weights.
            base: the model's client.
            catalog: where names are looked up.
            clock: for the date on an adapter's card.
            folder: what may be loaded over HTTP lies here; None for nothing.
        """
        self._engine = engine
        self._base = base
        self._catalog = catalog
        self._clock = clock
        self._folder = folder
        self._one_at_a_time = asyncio.Lock()
        self._orders: set[asyncio.Task[AdapterReport]] = set()

    def show_at_start(self, reports: tuple[AdapterReport, ...]) -> None:
        """Make the adapters that the engine loaded at start known.

        Raises:
            StartupError: a name is malformed, or the model's.
        """
        for report in reports:
            try:
                self._show(report)
            except InvalidParameterError as error:
                raise StartupError(f"lora_modules: {error.message}", param="lora_modules") from None

    async def adapters(self) -> Sequence[AdapterReport]:
        """As `AdapterAdmin.adapters`."""
        return await self._engine.adapters()

    async def load(self, name: str, *, folder: str, is_replacing: bool) -> AdapterReport:
        """As `AdapterAdmin.load`."""
        self._catalog.check_adapter_name(name)
        module = LoraModule(name=name, path=str(self._path_of(folder)), allow_links=False)
        return await self._to_the_end(self._load(module, is_replacing=is_replacing))

    async def unload(self, name: str) -> AdapterReport:
        """As `AdapterAdmin.unload`."""
        return await self._to_the_end(self._unload(name))

    async def _to_the_end(self, order: Coroutine[None, None, AdapterReport]) -> AdapterReport:
        """Carry an order out even if its client leaves: catalog and engine must know the same names."""
        task = asyncio.create_task(order)
        self._orders.add(task)
        task.add_done_callback(self._orders.discard)
        return await asyncio.shield(task)

    async def _load(self, module: LoraModule, *, is_replacing: bool) -> AdapterReport:
        async with self._one_at_a_time:
            report = await self._engine.load_adapter(module, is_replacing=is_replacing)
            self._show(report)
        return report

    async def _unload(self, name: str) -> AdapterReport:
        async with self._one_at_a_time:
            if not self._catalog.has_adapter(name):
                raise no_such_adapter(name)
            self._catalog.remove_adapter(ModelName(name))
            return await self._engine.unload_adapter(name)

    def _path_of(self, folder: str) -> Path:
        """The folder of that name in the operator's.

        Raises:
            InvalidParameterError: it is no plain name, or no folder there, or a link.
        """
        if self._folder is None:
            raise InvalidParameterError(
                "lora_path cannot be loaded: the server was started without lora_dir", param="lora_path"
            )
        if not FOLDER_NAME.fullmatch(folder):
            raise InvalidParameterError(
                f"lora_path is {folder!r:.140}, it must be the name of a folder in lora_dir: "
                "1 to 128 characters of A-Za-z0-9._-",
                param="lora_path",
            )
        path = self._folder / folder
        if path.is_symlink() or not path.is_dir():
            raise InvalidParameterError(
                f"lora_path is {folder!r}, there is no such folder in lora_dir", param="lora_path"
            )
        return path

    def _show(self, report: AdapterReport) -> None:
        name = self._catalog.check_adapter_name(report.name)
        client = AdapterClient(
            self._base, name=name, root=Path(report.path).name, created_unix_s=int(self._clock.wall())
        )
        self._catalog.put_adapter(client, name=name)
