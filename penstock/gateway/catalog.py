"""Which models this server has: a name or alias leads to a `ModelClient`.

The server never holds "the" engine; several models, versions and aliases live side by side here. Not a
router: choosing among replicas of one model is a later stage.
"""

import re
from typing import Final

import msgspec

from penstock.core.errors import InvalidParameterError, NotFoundError, NotReadyError, StartupError
from penstock.core.ids import ModelName
from penstock.core.ports import ModelClient
from penstock.core.text import ModelCard

MAX_NAMES: Final = 256
MAX_LISTED: Final = 20
"""Names in the message about an unknown one."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,127}")


def check_model_name(name: str, *, param: str = "served_model_name") -> None:
    """Refuse what no client could write.

    Raises:
        StartupError: the name is malformed.
    """
    if not _NAME.fullmatch(name):
        raise StartupError(
            f"{param} is {name!r:.140}, it must be 1 to 128 characters of A-Za-z0-9._/:@- and begin with a "
            "letter or digit",
            param=param,
        )


class Catalog:
    """Names and aliases of the models; the first model added is the default.

    Changed by `cli` at start and by operators who load and unload adapters, read by every request.
    """

    def __init__(self) -> None:
        self._clients: dict[ModelName, ModelClient] = {}
        self._aliases: dict[ModelName, ModelName] = {}
        self._adapters: dict[ModelName, ModelClient] = {}

    def add(self, client: ModelClient, *, name: ModelName, aliases: tuple[ModelName, ...] = ()) -> None:
        """Make a model known under its name and aliases.

        Args:
            client: who answers; may still be loading.
            name: the model's own name, 1 to 128 characters of `A-Za-z0-9._/:@-`.
            aliases: more names for the same model.

        Raises:
            StartupError: a name is malformed or taken, or there are more than 256.
        """
        for each in (name, *aliases):
            self._check_free(each)
        self._clients[name] = client
        self._aliases.update(dict.fromkeys(aliases, name))

    def put_adapter(self, client: ModelClient, *, name: ModelName) -> None:
        """Make an adapter known, or replace it; how many there may be is the engine's to bound.

        Args:
            client: who answers for it.
            name: checked by `check_adapter_name`.
        """
        self._adapters[name] = client

    def has_adapter(self, name: str) -> bool:
        """True if an adapter has this name."""
        return name in self._adapters

    def remove_adapter(self, name: ModelName) -> None:
        """Forget an adapter; requests that have begun go on."""
        self._adapters.pop(name, None)

    def check_adapter_name(self, name: str) -> ModelName:
        """The name, if an adapter may have it.

        Raises:
            InvalidParameterError: it is malformed, or a model's.
        """
        if not _NAME.fullmatch(name):
            raise InvalidParameterError(
                f"lora_name is {name!r:.140}, it must be 1 to 128 characters of A-Za-z0-9._/:@-",
                param="lora_name",
            )
        if name in self._clients or name in self._aliases:
            raise InvalidParameterError(f"lora_name is {name!r}, which is a model's name", param="lora_name")
        return ModelName(name)

    def _check_free(self, name: ModelName) -> None:
        check_model_name(name)
        if name in self._clients or name in self._aliases or name in self._adapters:
            raise StartupError(f"model name {name!r} is taken twice")
        if len(self._clients) + len(self._aliases) >= MAX_NAMES:
            raise StartupError(f"model name {name!r} is one too many, the limit is {MAX_NAMES}")

    @property
    def names(self) -> tuple[ModelName, ...]:
        """Every name and alias, models first, adapters last."""
        return (*self._clients, *self._aliases, *self._adapters)

    def resolve(self, name: ModelName | None) -> ModelClient:
        """Return who answers for `name`; the default model if it is None.

        Raises:
            NotFoundError: nobody does; the message lists the names that exist.
            NotReadyError: there is no model at all yet.
        """
        if not self._clients:
            raise NotReadyError("no model is loaded yet", retry_after_s=1.0)
        if name is None:
            return next(iter(self._clients.values()))
        client = self._clients.get(self._aliases.get(name, name)) or self._adapters.get(name)
        if client is None:
            raise self._unknown()
        return client

    def _unknown(self) -> NotFoundError:
        known = ", ".join(self.names[:MAX_LISTED])
        return NotFoundError(
            f"model is not one that this server has; it has: {known}", param="model", code="model_not_found"
        )

    def card(self, name: ModelName) -> ModelCard:
        """Card of a model; an alias has its own name and its model as parent.

        Raises:
            NotFoundError: no such name.
        """
        card = self.resolve(name).card
        if name in self._aliases:
            return msgspec.structs.replace(card, name=name, parent=self._aliases[name])
        return card

    def cards(self) -> list[ModelCard]:
        """Cards of all names, models first."""
        return [self.card(name) for name in self.names]

    @property
    def not_ready_reason(self) -> str | None:
        """None if every model can serve now, else `<model>: <word>` of the first that cannot."""
        if not self._clients:
            return "loading"
        for name, client in self._clients.items():
            if client.not_ready_reason is not None:
                return f"{name}: {client.not_ready_reason}"
        return None
