"""API keys: who is asking. A key is compared by its digest, in constant time, with every known key.

Keys themselves are not kept, only their SHA-256 digests; nothing here writes a key anywhere.
"""

import hashlib
import hmac
from collections import OrderedDict
from typing import Final

from penstock.core.errors import AuthenticationError, QueueFullError, StartupError
from penstock.core.ids import DEFAULT_TENANT, TenantId
from penstock.core.ports import Clock

MAX_KEYS: Final = 1024
MAX_KEY_CHARS: Final = 512
_MISSING: Final = "no API key was given; send the header Authorization: Bearer <key>"
_WRONG: Final = "the API key is not known here"


class KeyRing:
    """Known keys and the tenant each belongs to; an empty ring lets everybody in as the default tenant."""

    def __init__(self, keys: dict[str, TenantId] | None = None) -> None:
        """Keep the digests of `keys` (key to tenant).

        Raises:
            StartupError: more than 1,024 keys, or one that is empty or longer than 512 characters.
        """
        keys = keys or {}
        if len(keys) > MAX_KEYS:
            raise StartupError(f"there are {len(keys)} API keys, the limit is {MAX_KEYS}")
        for key in keys:
            if not 1 <= len(key) <= MAX_KEY_CHARS:
                raise StartupError(f"an API key has {len(key)} characters, it must have 1 to {MAX_KEY_CHARS}")
        self._tenants = [(_digest(key), tenant) for key, tenant in keys.items()]

    @property
    def is_empty(self) -> bool:
        """True if no key is asked for."""
        return not self._tenants

    def tenant_of(self, authorization: str | None) -> TenantId:
        """Tenant of an `Authorization` header's value.

        Raises:
            AuthenticationError: the header is missing or malformed, or its key is unknown.
        """
        if self.is_empty:
            return DEFAULT_TENANT
        presented = _digest(_bearer(authorization))
        found: TenantId | None = None
        # Every key is compared, so that the time tells nothing about which one matched.
        for digest, tenant in self._tenants:
            if hmac.compare_digest(digest, presented):
                found = tenant
        if found is None:
            raise AuthenticationError(_WRONG)
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _bearer(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise AuthenticationError(_MISSING)
    if len(key) > MAX_KEY_CHARS:
        raise AuthenticationError(_WRONG)
    return key


class FailureLimit:
    """Bounds failed log-ins per client address: a burst, then one a second; valid keys never wait.

    Remembers at most `max_clients` addresses, the longest silent is forgotten first.
    """

    def __init__(self, *, clock: Clock, burst: int = 20, max_clients: int = 4096) -> None:
        self._clock = clock
        self._burst = burst
        self._max_clients = max_clients
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def record(self, client: str) -> None:
        """Count one failure of `client`.

        Raises:
            QueueFullError: the client has failed too often; says when to come back.
        """
        now = self._clock.monotonic()
        full_at = max(self._full_at.pop(client, now), now) + 1.0
        self._full_at[client] = min(full_at, now + self._burst + 1.0)
        if len(self._full_at) > self._max_clients:
            self._full_at.popitem(last=False)
        if full_at > now + self._burst:
            raise QueueFullError(
                f"too many failed log-ins, more than {self._burst}",
                code="too_many_failures",
                retry_after_s=1.0,
            )
