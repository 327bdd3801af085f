"""An adapter's client asks for vectors, scores and classes with the adapter named."""

import pytest

from penstock.core.pooled import ClassifyRequest, EmbedRequest, ScoreRequest
from penstock.text.adapter_client import AdapterClient
from tests.fakes.model_client import FakeModelClient


@pytest.mark.parametrize(
    ("ask", "request_"),
    [
        ("embed", EmbedRequest(request_id="r", model="m", prompt="a")),
        ("score", ScoreRequest(request_id="r", model="m", query="a", document="b")),
        ("classify", ClassifyRequest(request_id="r", model="m", prompt="a")),
    ],
)
async def test_the_adapter_is_named(ask, request_):
    base = FakeModelClient()
    await getattr(AdapterClient(base, name="french", root="f", created_unix_s=0), ask)(request_)
    assert [asked.adapter for asked in base.pooled] == ["french"]
