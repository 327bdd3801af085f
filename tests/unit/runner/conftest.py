"""Every law of the runner holds where results are read at once and where they come by a device's queue."""

import pytest

from tests.unit.runner.fake_model import FakeLoaded


@pytest.fixture(params=[False, True], ids=["at-once", "queued"])
def is_queued(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(FakeLoaded, "is_queued_by_default", request.param)
    return request.param
