"""Implements `AdapterAdmin`: whatever it is told to load is there, and it remembers what it was told."""

from collections.abc import Sequence

from penstock.core.tokens import AdapterReport


class FakeAdapters:
    """One adapter `a`, and what orders add."""

    def __init__(self) -> None:
        self.orders: list[tuple[str, str, bool]] = []

    async def adapters(self) -> Sequence[AdapterReport]:
        return [self._report("a")]

    async def load(self, name: str, *, folder: str, is_replacing: bool) -> AdapterReport:
        self.orders.append((name, folder, is_replacing))
        return self._report(name)

    async def unload(self, name: str) -> AdapterReport:
        self.orders.append((name, "", False))
        return self._report(name)

    @staticmethod
    def _report(name: str) -> AdapterReport:
        return AdapterReport(
            name=name,
            revision="0123",
            rank=8,
            num_bytes=4096,
            is_in_memory=True,
            num_requests=2,
            path="/srv/secret/place",
        )
