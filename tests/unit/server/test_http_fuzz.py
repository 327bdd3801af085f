"""Whatever is sent, the server answers below 500, in its own shape, and leaves no request running."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.server.dialects.openai.chat import ChatMessage, ChatRequest
from penstock.server.dialects.openai.completions import CompletionRequest
from penstock.server.dialects.openai.fields import REFUSED
from tests.fakes.http_server import bench

TEXTS = st.text(st.characters(codec=None), max_size=8)
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([2**63, -(2**63) - 1, 10**400, -0.0, 1e308]))
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON = st.recursive(
    LEAVES, lambda each: st.lists(each, max_size=4) | st.dictionaries(TEXTS, each, max_size=4), max_leaves=8
)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(sorted(ChatMessage.model_fields)), JSON | st.just("user"), max_size=4),
    max_size=3,
)
NAMES = st.sampled_from(sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *REFUSED}))
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "messages": MESSAGES | st.just([{"role": "user", "content": "x"}]),
        "prompt": JSON | st.just("x"),
    },
).flatmap(lambda base: st.dictionaries(NAMES, JSON, max_size=3).map(lambda more: base | more))
PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/generate", "/stream"]


async def post(path: str, body: bytes) -> None:
    async with bench() as b:
        reply = await b.http.post(path, content=body, headers={"content-type": "application/json"})
        assert reply.status_code < 500, (body, reply.text)
        if reply.status_code != 200:
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
            assert len(reply.text) < 1500
        assert b.model.num_open == 0
        assert b.services.budget.held_bytes == 0


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(body=BODIES)
def test_any_value_in_any_field(path, body):
    asyncio.run(post(path, json.dumps(body).encode()))


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    body=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()),
    path=st.sampled_from(PATHS),
)
def test_any_bytes(path, body):
    asyncio.run(post(path, body))
