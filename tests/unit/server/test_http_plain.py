"""The plain API: query and JSON, the same string twice, events `update` and `close`."""

import json

import pytest

from tests.fakes.http_server import bench


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_text_and_response_are_the_same_string(method):
    fields = {"prompt": "hi", "max_tokens": 2, "temperature": 0}
    async with bench() as b:
        if method == "GET":
            reply = await b.http.get("/generate", params=fields)
        else:
            reply = await b.http.post("/generate", json=fields)
    assert reply.json() == {
        "text": "Hello,",
        "response": "Hello,",
        "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
    }
    assert b.model.requests[0].params.temperature == 0


async def test_a_post_may_bring_its_fields_in_the_query_instead_of_a_body():
    async with bench() as b:
        reply = await b.http.post("/generate?prompt=hi&max_tokens=2")
        both = await b.http.post("/generate?max_tokens=2", json={"prompt": "hi"})
        neither = await b.http.post("/generate")
    assert reply.json()["text"] == "Hello,"
    assert (both.status_code, neither.status_code) == (400, 400)


async def test_a_number_in_the_query_is_read_as_in_json():
    async with bench() as b:
        whole = await b.http.get("/generate?prompt=a&max_tokens=2.0")
        half = await b.http.get("/generate?prompt=a&max_tokens=1.5")
    assert whole.json()["text"] == "Hello,"
    assert half.json()["error"]["message"] == "max_tokens is 1.5, it must be an integer"


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_stream_sends_updates_and_closes_with_the_usage(method):
    async with bench() as b:
        if method == "GET":
            reply = await b.http.get("/stream", params={"prompt": "hi"})
        else:
            reply = await b.http.post("/stream", json={"prompt": "hi"})
    blocks = [block.split("\n") for block in reply.text.strip().split("\n\n")]
    texts = [json.loads(data[6:])["text"] for event, data in blocks if event == "event: update"]
    assert "".join(texts) == "Hello, world!"
    assert blocks[-1][0] == "event: close"
    assert json.loads(blocks[-1][1][6:])["total_tokens"] == 11


@pytest.mark.parametrize("path", ["/generate", "/stream"])
@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("", "prompt"),
        ("prompt=", "prompt"),
        ("prompt=a&max_tokens=x", "max_tokens"),
        ("prompt=a&max_tokens=1_0", "max_tokens"),
        ("prompt=a&max_tokens=0", "max_tokens"),
        ("prompt=a&temperature=nan", "temperature"),
        ("prompt=a&temperature=9", "temperature"),
        ("prompt=a&inputs=b", "inputs"),
        ("prompt=a&zz=b", "zz"),
        ("prompt=a&prompt=b", None),
        ("prompt=%ff", None),
        ("prompt=%00", None),
        ("prompt=" + "a" * 9000, None),
    ],
)
async def test_a_wrong_query_is_a_400_that_names_it(path, query, param):
    async with bench() as b:
        reply = await b.http.get(f"{path}?{query}")
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param, reply.text


async def test_a_body_with_inputs_is_refused_by_name():
    async with bench() as b:
        reply = await b.http.post("/generate", json={"inputs": "hi", "parameters": {}})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "inputs"
