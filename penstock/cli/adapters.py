"""The adapters of one served model: its engine has their weights, the catalog their names.

Names enter the catalog when the engine has them, and leave it before the engine forgets them.
"""

from pathlib import Path

from penstock.core.errors import InvalidParameterError, StartupError
from penstock.core.ports import Clock, ModelClient
from penstock.core.tokens import AdapterReport
from penstock.gateway.catalog import Catalog
from penstock.text.adapter_client import AdapterClient


class ServedAdapters:
    """See the module."""

    def __init__(self, base: ModelClient, *, catalog: Catalog, clock: Clock) -> None:
        """Join the parts.

        Args:
            base: the model's client.
            catalog: where names are looked up.
            clock: for the date on an adapter's card.
        """
        self._base = base
        self._catalog = catalog
        self._clock = clock

    def show_at_start(self, reports: tuple[AdapterReport, ...]) -> None:
        """Make the adapters that the engine loaded at start known.

        Raises:
            StartupError: a name is malformed, or the model's.
        """
        for report in reports:
            try:
                self._catalog.check_adapter_name(report.name)
            except InvalidParameterError as error:
                raise StartupError(f"lora_modules: {error.message}", param="lora_modules") from None
            self._show(report)

    def _show(self, report: AdapterReport) -> None:
        name = self._catalog.check_adapter_name(report.name)
        client = AdapterClient(
            self._base, name=name, root=Path(report.path).name, created_unix_s=int(self._clock.wall())
        )
        self._catalog.put_adapter(client, name=name)
