"""Keys: who asks, compared by digest in constant time, and a bound on failed tries."""

import hmac
from types import SimpleNamespace

import pytest

from penstock.core.errors import AuthenticationError, QueueFullError, StartupError
from penstock.core.ids import DEFAULT_TENANT, TenantId
from penstock.gateway import keys
from penstock.gateway.keys import FailureLimit, KeyRing
from tests.fakes.manual_clock import ManualClock

RING = {"key-a": TenantId("a"), "key-b": TenantId("b")}


def test_a_key_names_its_tenant():
    ring = KeyRing(RING)
    assert ring.tenant_of("Bearer key-a") == "a"
    assert ring.tenant_of("bearer  key-b ") == "b"


@pytest.mark.parametrize(
    "value", [None, "", "key-a", "Basic key-a", "Bearer", "Bearer key-c", "Bearer key-", "Bearer \udcff"]
)
def test_anything_else_is_refused_without_repeating_it(value):
    with pytest.raises(AuthenticationError) as caught:
        KeyRing(RING).tenant_of(value)
    assert "key-" not in caught.value.message


def test_an_empty_ring_lets_everybody_in_as_the_default_tenant():
    assert KeyRing().is_empty
    assert KeyRing().tenant_of(None) == DEFAULT_TENANT


def test_every_known_key_is_compared_whichever_matches(monkeypatch):
    compared = []

    def spy(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(keys, "hmac", SimpleNamespace(compare_digest=spy))
    KeyRing(RING).tenant_of("Bearer key-a")
    assert compared == [(32, 32), (32, 32)]


def test_the_ring_keeps_no_key():
    assert "key-a" not in repr(vars(KeyRing(RING)))


@pytest.mark.parametrize(
    "bad", [{"": TenantId("a")}, {"k" * 513: TenantId("a")}, {str(i): TenantId("a") for i in range(1025)}]
)
def test_sizes_are_bounded(bad):
    with pytest.raises(StartupError, match=r"limit is 1024|1 to 512"):
        KeyRing(bad)


def test_failures_come_in_a_burst_and_then_once_a_second():
    clock = ManualClock()
    limit = FailureLimit(clock=clock, burst=3)
    for _ in range(3):
        limit.record("1.2.3.4")
    with pytest.raises(QueueFullError) as caught:
        limit.record("1.2.3.4")
    assert caught.value.retry_after_s == 1.0
    limit.record("5.6.7.8")
    clock.advance(2.5)
    limit.record("1.2.3.4")
    with pytest.raises(QueueFullError):
        limit.record("1.2.3.4")


def test_the_memory_of_failures_is_bounded_and_forgets_the_longest_silent():
    limit = FailureLimit(clock=ManualClock(), burst=1, max_clients=2)
    for client in ("a", "b", "c"):
        limit.record(client)
    limit.record("a")
    with pytest.raises(QueueFullError):
        limit.record("c")
