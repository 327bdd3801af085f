"""Fields that a client leaves out take the model author's suggestion, at every door."""

import pytest

from penstock.core.params import SamplingParams
from tests.fakes.http_server import bench
from tests.fakes.model_client import FakeModelClient

SUGGESTED = SamplingParams(temperature=0.6, top_p=0.9, top_k=20)
DOORS = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ("/v1/completions", {"prompt": "hi"}),
    ("/generate", {"prompt": "hi"}),
]


@pytest.mark.parametrize(("url", "body"), DOORS)
async def test_absent_fields_are_the_models_and_present_ones_the_clients(url, body):
    model = FakeModelClient(default_sampling=SUGGESTED)
    async with bench(model) as b:
        assert (await b.http.post(url, json=body)).status_code == 200
        assert (await b.http.post(url, json=body | {"temperature": 0})).status_code == 200
    silent, explicit = (request.params for request in model.requests)
    assert (silent.temperature, silent.top_p, silent.top_k) == (0.6, 0.9, 20)
    assert (explicit.temperature, explicit.top_p, explicit.top_k) == (0, 0.9, 20)
