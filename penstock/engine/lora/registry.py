"""The names of adapters and the versions that they stand for. Pure: no file, no weights.

A version is known by the hash of its files. Two names may stand for one version; a name that is replaced
stands for another from then on, while requests of the old one go on with what they began with.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from penstock.core.errors import InvalidParameterError, NotFoundError, no_such_adapter

MAX_ADAPTERS: Final = 16_384
"""Names; beyond it an adapter is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterVersion:
    """What is known of an adapter's weights, in memory or not."""

    revision: str
    """Hash of its files."""
    folder: Path
    """Where to read it again."""
    allow_links: bool
    rank: int
    """0 if it has not been read in this process."""
    num_bytes: int
    """In memory; as `rank`."""


class AdapterRegistry:
    """See the module."""

    def __init__(self) -> None:
        self._versions: dict[str, AdapterVersion] = {}

    def __len__(self) -> int:
        return len(self._versions)

    def __contains__(self, name: str) -> bool:
        return name in self._versions

    def items(self) -> list[tuple[str, AdapterVersion]]:
        """Names and versions, oldest name first."""
        return list(self._versions.items())

    def get(self, name: str) -> AdapterVersion:
        """The version that a name stands for.

        Raises:
            NotFoundError: no such name.
        """
        version = self._versions.get(name)
        if version is None:
            raise NotFoundError(
                f"model is {name!r:.140}, there is no such adapter any more",
                param="model",
                code="model_not_found",
            )
        return version

    def check_room(self, name: str, *, replace: bool) -> None:
        """Refuse a name that is taken, or one too many.

        Raises:
            InvalidParameterError: names the limit.
        """
        if name in self._versions:
            if not replace:
                raise InvalidParameterError(
                    f"lora_name is {name!r}, which is loaded; set load_inplace to replace it",
                    param="lora_name",
                )
        elif len(self._versions) >= MAX_ADAPTERS:
            raise InvalidParameterError(
                f"lora_name is {name!r}, one too many: at most {MAX_ADAPTERS} adapters are possible",
                param="lora_name",
            )

    def put(self, name: str, version: AdapterVersion) -> AdapterVersion | None:
        """Let a name stand for a version; returns the one for which it stood."""
        before = self._versions.get(name)
        self._versions[name] = version
        return before

    def remove(self, name: str) -> AdapterVersion:
        """Forget a name; returns the version for which it stood.

        Raises:
            NotFoundError: no such name.
        """
        if name not in self._versions:
            raise no_such_adapter(name)
        return self._versions.pop(name)

    def has_revision(self, revision: str) -> bool:
        """True if some name stands for it. Cost: O(names)."""
        return any(version.revision == revision for version in self._versions.values())
