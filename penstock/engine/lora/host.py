"""The adapters of one engine: operators' orders in, versions and weights out.

Joins registry, store and slots. An order to load is carried out in the store's thread, so that running
answers go on; the step loop takes its outcome in between two steps. Owned by `engine/core`.
"""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from penstock.core.errors import InvalidParameterError, PenstockError, StartupError, no_such_adapter
from penstock.core.tokens import AdapterReport, EngineRequest
from penstock.engine.config import LoraConfig, LoraModule
from penstock.engine.lora.adapter import LoraLimits, read_adapter
from penstock.engine.lora.registry import AdapterRegistry, AdapterVersion
from penstock.engine.lora.slots import AdapterSlots
from penstock.engine.lora.store import AdapterStore, ReadAdapter, StoreLimits, check_same
from penstock.kernels.adapters import AdapterWeights, LoraSites, LowRankPair

MAX_ORDERS: Final = 64
"""Adapters being loaded by operators at once; one more is refused."""

Prepare = Callable[[dict[int, LowRankPair]], AdapterWeights]
"""Matrices by site to weights as the kernels want them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOrder:
    """An operator wants a folder loaded."""

    question_id: int
    module: LoraModule
    is_replacing: bool
    """The name may be taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOutcome:
    """How an order ended."""

    question_id: int
    adapter: AdapterReport | None
    error: PenstockError | None


class AdapterHost:
    """See the module. Used from the step loop's thread only."""

    def __init__(self, config: LoraConfig, *, sites: LoraSites, prepare: Prepare) -> None:
        """Begin without adapters.

        Args:
            config: checked limits.
            sites: of the model.
            prepare: `ops.prepare_adapter` of its kernels.
        """
        self._sites = sites
        self._prepare = prepare
        self._limits = LoraLimits(max_rank=config.max_lora_rank, max_bytes=config.lora_memory_bytes)
        self._registry = AdapterRegistry()
        self._orders: list[tuple[LoadOrder, Future[ReadAdapter]]] = []
        self._outcomes: list[LoadOutcome] = []
        self.store = AdapterStore(
            StoreLimits(max_adapters=config.max_cpu_loras, max_bytes=config.lora_memory_bytes),
            read=self._read_again,
            is_named=self._registry.has_revision,
        )
        self.slots = AdapterSlots(config.max_loras, weights=self.store)

    # -- at start ------------------------------------------------------------------------------------------

    def load_at_start(self, modules: tuple[LoraModule, ...]) -> None:
        """Load what the command line names; what was loaded before a restart is only registered.

        Raises:
            StartupError: names the module and what is wrong with it.
        """
        for module in modules:
            try:
                self._registry.check_room(module.name, replace=False)
                if module.revision:
                    self._register_known(module)
                else:
                    self._take_in(module, self._read_new(module))
            except PenstockError as error:
                raise StartupError(
                    f"lora_modules: {module.name}: {error.message}", param="lora_modules"
                ) from None

    def _register_known(self, module: LoraModule) -> None:
        version = AdapterVersion(
            revision=module.revision,
            folder=Path(module.path),
            allow_links=module.allow_links,
            rank=0,
            num_bytes=0,
        )
        self.store.know(version)
        self._registry.put(module.name, version)

    # -- requests ------------------------------------------------------------------------------------------

    def resolve(self, request: EngineRequest) -> str:
        """The version that a request for an adapter gets, whatever becomes of the name later.

        Raises:
            NotFoundError: the name is not there (any more).
        """
        return self._registry.get(request.adapter).revision

    def weights(self, revision: str) -> AdapterWeights:
        """Of a version that is bound to a slot."""
        return self.store.weights(revision)

    # -- orders --------------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """True while something is being read."""
        return bool(self._orders) or self.store.is_reading

    def wait(self, timeout_s: float) -> None:
        """Return when something has been read, or after so long."""
        futures = [future for _, future in self._orders]
        wait([*futures, *self.store.reads], timeout=timeout_s, return_when=FIRST_COMPLETED)

    def begin_load(self, order: LoadOrder) -> None:
        """Start to load a folder; `take_outcomes` tells how it ended.

        Raises:
            InvalidParameterError: the name is taken, or too much is loaded at once.
        """
        self._registry.check_room(order.module.name, replace=order.is_replacing)
        if len(self._orders) >= MAX_ORDERS:
            raise InvalidParameterError(
                f"lora_name is {order.module.name!r}: {MAX_ORDERS} adapters are being loaded, wait for them",
                param="lora_name",
            )
        self._orders.append((order, self.store.submit(partial(self._read_new, order.module))))

    def unload(self, name: str) -> AdapterReport:
        """Forget a name; requests that have begun go on.

        Raises:
            NotFoundError: no such name.
        """
        report = self.report(name)
        self.slots.forget(self._registry.remove(name).revision)
        return report

    def poll(self) -> None:
        """Take in what has been read since the last call."""
        self.store.poll()
        ended = [(order, future) for order, future in self._orders if future.done()]
        self._orders = [(order, future) for order, future in self._orders if not future.done()]
        self._outcomes += [self._end_order(order, future) for order, future in ended]

    def take_outcomes(self) -> list[LoadOutcome]:
        """Orders that have ended since the last call."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _end_order(self, order: LoadOrder, future: "Future[ReadAdapter]") -> LoadOutcome:
        name = order.module.name
        failure = future.exception()
        if failure is not None:
            return LoadOutcome(question_id=order.question_id, adapter=None, error=_refusal(failure))
        try:
            # Again: another order may have ended meanwhile.
            self._registry.check_room(name, replace=order.is_replacing)
        except PenstockError as error:
            return LoadOutcome(question_id=order.question_id, adapter=None, error=error)
        self._take_in(order.module, future.result())
        return LoadOutcome(question_id=order.question_id, adapter=self.report(name), error=None)

    def _take_in(self, module: LoraModule, read: ReadAdapter) -> None:
        before = self._registry.put(module.name, read.version)
        self.store.add(read)
        if before is not None:
            self.slots.forget(before.revision)

    # -- what is told --------------------------------------------------------------------------------------

    def report(self, name: str) -> AdapterReport:
        """What is known of one adapter.

        Raises:
            NotFoundError: no such name.
        """
        if name not in self._registry:
            raise no_such_adapter(name)
        version = self.store.version(self._registry.get(name).revision)
        return AdapterReport(
            name=name,
            revision=version.revision,
            rank=version.rank,
            num_bytes=version.num_bytes,
            is_in_memory=version.revision in self.store,
            num_requests=self.slots.num_requests(version.revision),
            path=str(version.folder),
            allow_links=version.allow_links,
        )

    def reports(self) -> list[AdapterReport]:
        """All adapters, oldest name first."""
        return [self.report(name) for name, _ in self._registry.items()]

    def close(self) -> None:
        """End the thread."""
        self.store.close()

    # -- in the thread -------------------------------------------------------------------------------------

    def _read_new(self, module: LoraModule) -> ReadAdapter:
        return self._read(Path(module.path), allow_links=module.allow_links, expected=None)

    def _read_again(self, version: AdapterVersion) -> ReadAdapter:
        return self._read(version.folder, allow_links=version.allow_links, expected=version)

    def _read(self, folder: Path, *, allow_links: bool, expected: AdapterVersion | None) -> ReadAdapter:
        """Read, check and prepare a folder, which must still be what it was if it was known."""
        adapter = read_adapter(folder, sites=self._sites, limits=self._limits, allow_links=allow_links)
        if expected is not None:
            check_same(expected, adapter)
        weights = self._prepare(dict(adapter.pairs))
        version = AdapterVersion(
            revision=adapter.revision,
            folder=folder,
            allow_links=allow_links,
            rank=adapter.rank,
            num_bytes=weights.num_bytes,
        )
        return ReadAdapter(version=version, weights=weights)


def _refusal(failure: BaseException) -> PenstockError:
    """The answer to an order: ours, or for what no check foresaw (memory, the disk) the error's kind."""
    if isinstance(failure, PenstockError):
        return failure
    return InvalidParameterError(
        f"adapter: it cannot be read ({type(failure).__name__})", param="lora_path", code="invalid_adapter"
    )
