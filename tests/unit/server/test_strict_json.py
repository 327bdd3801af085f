"""The body reader: what is not plain, bounded, unambiguous JSON is a 400 or 413 that says why."""

import pytest

from penstock.core.errors import InvalidParameterError, NotReadyError
from penstock.server.body import BodyBudget, parse_json
from penstock.server.limits import Limits
from tests.fakes.http_server import bench

URL = "/v1/completions"
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "line 1, column 1"),
        (b"{", "line 1, column 2"),
        (b'{"a": 1}x', "column 9"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": NaN}', "literal NaN"),
        (b'{"a": -Infinity}', "literal -Infinity"),
        (b'{"a": 1e400}', "beyond the range"),
        (b'{"a": 1, "a": 2}', "key 'a' twice"),
        (b'{"a": "\\ud800"}', "a has a lone surrogate"),
        (b'{"a": [{"b": "x\\u0000"}]}', "a.0.b has a NUL character at index 1"),
        (b'{"\\ud800": 1}', "lone surrogate"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b"[" * 65 + b"]" * 65, "deeper than the limit of 64"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "deeper than the limit of 64"),
        (b"[" * 4_000_000, "deeper than the limit of 64"),
        (b'"' + b'\\"' * 500_000, "not JSON"),
        (b'["\x01"]', "not JSON"),
    ],
)
def test_what_is_wrong_is_named(body, told):
    with pytest.raises(InvalidParameterError) as caught:
        parse_json(body)
    assert told in caught.value.message
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b"[" * 64 + b"]" * 64, None),
        (b'{"a": "' + b"[{" * 100 + b'"}', {"a": "[{" * 100}),
        (b'{"a": "' + b'\\"[' * 100 + b'"}', {"a": '"[' * 100}),
        (b'["\\ud83d\\ude00", "\\u00e9"]', ["\U0001f600", "é"]),
        (b"[" + b"[]," * 100 + b"1e300]", [[]] * 100 + [1e300]),
    ],
)
def test_what_is_right_is_read(body, value):
    read = parse_json(body)
    assert value is None or read == value


@pytest.mark.parametrize("body", [b"[]", b"1", b"null", b'"x"', b"true"])
async def test_a_body_that_is_no_object_is_a_400(body):
    async with bench() as b:
        reply = await b.http.post(URL, content=body, headers=JSON)
    assert reply.status_code == 400
    assert "object" in reply.json()["error"]["message"]


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_beyond_the_limit_is_a_413_and_is_not_read_to_its_end(announced):
    taken = 0

    async def pieces():
        nonlocal taken
        for _ in range(100):
            taken += 1000
            yield b" " * 1000

    headers = JSON | ({"content-length": "100000"} if announced else {})
    async with bench(limits=Limits(body_bytes_max=5000)) as b:
        reply = await b.http.post(URL, content=pieces(), headers=headers)
    assert reply.status_code == 413
    assert "5000" in reply.json()["error"]["message"]
    assert taken <= 7000
    assert b.services.budget.held_bytes == 0


async def test_a_long_body_is_parsed_in_a_thread_and_gives_the_same_answer():
    async with bench() as b:
        reply = await b.http.post(URL, json={"prompt": "x" * 200_000})
        wrong = await b.http.post(URL, content=b'{"prompt": "' + b"x" * 200_000, headers=JSON)
    assert reply.status_code == 200
    assert len(b.model.requests[0].prompt) == 200_000
    assert wrong.status_code == 400
    assert b.services.budget.held_bytes == 0


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
async def test_only_plain_json_is_read(headers):
    async with bench() as b:
        reply = await b.http.post(URL, content=b'{"prompt": "a"}', headers=headers)
    assert reply.status_code == 400
    assert b.model.requests == []


def test_bodies_of_all_requests_together_are_bounded():
    budget = BodyBudget(100)
    budget.reserve(60)
    with pytest.raises(NotReadyError):
        budget.reserve(41)
    budget.reserve(40)
    budget.free(100)
    assert budget.held_bytes == 0
