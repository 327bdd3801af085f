"""Who may ask by which name: local listeners answer to local names, open ones are warned of."""

import logging

import pytest

from penstock.cli.http_side import allowed_hosts, is_loopback
from penstock.cli.settings import ServeSettings


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_a_local_listener_without_a_key_answers_to_local_names(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    allowed = allowed_hosts(ServeSettings(host=host))
    assert allowed is not None
    assert {"127.0.0.1", "localhost", "[::1]", host} == set(allowed)
    assert is_loopback(host)
    assert not caplog.records


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "server.example"])
def test_a_listener_that_is_open_to_all_is_warned_of_once(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="penstock.cli"):
        assert allowed_hosts(ServeSettings(host=host)) is None
    assert [record.getMessage() for record in caplog.records] == ["open to the network without an API key"]


def test_a_key_protects_under_every_name(caplog: pytest.LogCaptureFixture) -> None:
    assert allowed_hosts(ServeSettings(host="127.0.0.1", api_key="k" * 16)) is None
    assert not caplog.records
