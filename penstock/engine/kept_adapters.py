"""The adapters that an engine has loaded, kept for the engine that follows it after a restart."""

import msgspec

from penstock.core.tokens import AdapterReport
from penstock.engine.config import EngineConfig, LoraModule


class KeptAdapters:
    """By name, as the engine last told them."""

    def __init__(self) -> None:
        self._modules: dict[str, LoraModule] = {}

    def keep(self, report: AdapterReport) -> None:
        """The engine has loaded it, or a new version of it."""
        self._modules[report.name] = LoraModule(
            name=report.name,
            path=report.path,
            allow_links=report.allow_links,
            revision=report.revision,
        )

    def drop(self, name: str) -> None:
        """The engine has unloaded it."""
        self._modules.pop(name, None)

    def in_config(self, config: EngineConfig) -> EngineConfig:
        """The config of the next engine, which reads them on demand."""
        lora = msgspec.structs.replace(config.lora, modules=tuple(self._modules.values()))
        return msgspec.structs.replace(config, lora=lora)
