"""The API document is true: it names every route and field, and requests made from it never break the server."""

import json

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

from penstock.server.app import PUBLIC_ROUTES, make_app
from penstock.server.document import openapi
from penstock.server.limits import Limits
from tests.fakes.http_server import bench, services_for
from tests.fakes.model_client import FakeModelClient

DOCUMENT = openapi(PUBLIC_ROUTES, title="Penstock", asks_keys=False)


async def test_the_document_is_served_and_names_every_route():
    async with bench() as b:
        document = (await b.http.get("/openapi.json")).json()
        page = await b.http.get("/docs")
    assert document == json.loads(json.dumps(DOCUMENT))
    for route in PUBLIC_ROUTES:
        path = route.path.replace(":path", "")
        assert set(document["paths"][path]) == {method.lower() for method in route.methods}
        assert path in page.text


def test_bounds_are_written_as_json_schema_writes_them():
    """A reader of the document would not know the library's own words for bounds."""

    def keys(value: object) -> set[str]:
        if isinstance(value, dict):
            own = {name for name, each in value.items() if not (name == "strict" and isinstance(each, dict))}
            return own.union(*map(keys, value.values()))  # a function has a field `strict` of its own
        return set().union(*map(keys, value)) if isinstance(value, list) else set()

    chat = DOCUMENT["components"]["schemas"]["ChatRequest"]["properties"]
    assert not keys(DOCUMENT) & {"ge", "gt", "le", "lt", "strict"}
    assert {"type": "integer", "minimum": 1, "maximum": 8} in chat["n"]["anyOf"]
    plain = DOCUMENT["paths"]["/generate"]["get"]["parameters"]
    assert [each["schema"].get("minimum") for each in plain if each["name"] == "max_tokens"] == [1]


async def test_the_page_loads_nothing_and_runs_nothing():
    async with bench() as b:
        page = await b.http.get("/docs")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text
    assert "http" not in page.text.replace(f"curl http://{page.url.netloc.decode()}/v1", "")


@pytest.mark.parametrize("host", ["box.local:9001", "127.0.0.1:80", "[::1]:8000"])
async def test_the_example_asks_the_address_that_the_page_came_from(host):
    async with bench() as b:
        page = await b.http.get("/docs", headers={"host": host})
    assert f"<pre>curl http://{host}/v1/chat/completions -H" in page.text


@pytest.mark.parametrize("host", ["<script>", "x;reboot", "$(id)", "a b"])
async def test_the_example_shows_no_host_that_is_not_one(host):
    async with bench() as b:
        page = await b.http.get("/docs", headers={"host": host})
    assert "<pre>curl http://penstock/v1/chat/completions -H" in page.text


@pytest.mark.parametrize(
    "name", ["ChatAnswer", "CompletionAnswer", "ErrorAnswer", "ModelList", "PlainAnswer"]
)
async def test_answers_fit_their_schemas(name):
    asked = {
        "ChatAnswer": (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "logprobs": True},
        ),
        "CompletionAnswer": ("/v1/completions", {"prompt": "x", "logprobs": 1}),
        "ErrorAnswer": ("/v1/completions", {}),
        "PlainAnswer": ("/generate", {"prompt": "x"}),
    }
    async with bench() as b:
        if name == "ModelList":
            reply = await b.http.get("/v1/models")
        else:
            url, body = asked[name]
            reply = await b.http.post(url, json=body)
    wanted = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    jsonschema_rs.validate(wanted, reply.json())


_model = FakeModelClient()
_app = make_app(services_for(_model, limits=Limits(thread_bytes_min=1 << 30)))
schema = schemathesis.openapi.from_asgi("/openapi.json", _app)


@schema.parametrize()
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_request_made_from_the_document_breaks_the_server(case):
    _model.requests.clear()
    # In company a machine may take longer than the ten seconds of the default; nothing here is timed.
    response = case.call(timeout=120)
    assert response.status_code < 500, (case.body, response.text)
    # Fields that contradict each other (min_tokens beyond max_tokens) fit the schema and are refused rightly.
    case.validate_response(response, excluded_checks=[schemathesis.checks.positive_data_acceptance])
    assert _model.num_open == 0
