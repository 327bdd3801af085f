"""The API document, made from the route table: `/openapi.json` for machines, `/docs` for people.

The page is one static file of our own: no script, nothing from elsewhere.
"""

import html
from typing import Any, Final

import msgspec
from pydantic.json_schema import models_json_schema

from penstock.server.replies import HTML_TYPE, Reply, StreamReply
from penstock.server.routes import Access, Document, Route
from penstock.server.services import Call
from penstock.server.validation import AnswerModel

Json = dict[str, Any]  # Any: free-form JSON of the OpenAPI standard

_REF: Final = "#/components/schemas/"
_EVENTS: Final = "text/event-stream"
_EVENT: Final[Json] = {
    "description": "data is JSON, or [DONE] after the last event; the event `error` holds an ErrorAnswer.",
    "type": "object",
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
    "required": ["data"],
}
_WORDS: Final = {
    400: "A field is wrong; the message names it.",
    401: "No API key, or a wrong one.",
    404: "What the request names does not exist.",
    413: "The body is too large.",
    429: "The queue is full; wait as Retry-After says.",
    500: "The server failed on this request.",
    503: "Loading, draining or restarting; wait as Retry-After says.",
}
_CSP: Final = b"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
_STYLE: Final = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}"
    "code,pre{font:14px/1.4 ui-monospace,monospace}pre{background:#8881;padding:1rem;overflow:auto}"
    "h2{border-top:1px solid #8886;padding-top:1rem}"
    "td,th{text-align:left;vertical-align:top;padding:.2rem .8rem .2rem 0}"
    ":root{color-scheme:light dark}"
)


class ErrorDetail(AnswerModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(AnswerModel):
    """Every error of every route."""

    error: ErrorDetail


def _statuses(route: Route) -> set[int]:
    statuses = {400, *route.document.also}
    if route.access is not Access.PUBLIC:
        statuses |= {401, 429}
    if route.body is not None:
        statuses.add(413)
    if route.counts_as_work:
        statuses |= {429, 500, 503}
    return statuses


def _answer_content(document: Document) -> Json:
    schema: Json = {} if document.media_type == "application/json" else {"type": "string"}
    if document.answer is not None:
        schema = {"$ref": _REF + document.answer.__name__}
    content: Json = {document.media_type: {"schema": schema}}
    if document.streams or document.media_type == _EVENTS:
        content[_EVENTS] = {"schema": _EVENT}
    return content


def _responses(route: Route) -> Json:
    responses: Json = {"200": {"description": "Answer", "content": _answer_content(route.document)}}
    if route.path == "/health/ready":
        responses["503"] = {"description": "Not ready", "content": _answer_content(route.document)}
    for status in sorted(_statuses(route)):
        responses[str(status)] = {
            "description": _WORDS[status],
            "content": {"application/json": {"schema": {"$ref": _REF + "ErrorAnswer"}}},
        }
    return responses


def _parameters(route: Route, method: str) -> list[Json]:
    found: list[Json] = []
    if "{model" in route.path:
        found.append({"name": "model", "in": "path", "required": True, "schema": {"type": "string"}})
    if method == "GET" and route.body is not None:
        schema = route.body.model_json_schema()
        found += [
            {"name": name, "in": "query", "required": name in schema["required"], "schema": _not_null(each)}
            for name, each in schema["properties"].items()
        ]
    return found


def _not_null(schema: Json) -> Json:
    """A query has no null."""
    branches = [each for each in schema.get("anyOf", []) if each != {"type": "null"}]
    return branches[0] if branches else schema


def _operation(route: Route, method: str, *, asks_keys: bool) -> Json:
    operation: Json = {
        "summary": route.document.summary,
        "operationId": f"{method.lower()}_{route.serve.__name__}",
        "tags": [route.document.tag],
        "parameters": _parameters(route, method),
        "responses": _responses(route),
    }
    if method == "POST" and route.body is not None:
        schema = {"$ref": _REF + route.body.__name__}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if asks_keys and route.access is not Access.PUBLIC:
        operation["security"] = [{"key": []}]
    return operation


def _schemas(routes: tuple[Route, ...]) -> Json:
    bodies = {route.body for route in routes if route.body is not None}
    answers = {route.document.answer for route in routes if route.document.answer is not None}
    models = [
        *((model, "validation") for model in bodies),
        *((model, "serialization") for model in [*answers, ErrorAnswer]),
    ]
    _, document = models_json_schema(models, ref_template=_REF + "{model}")  # type: ignore[arg-type]  # literal modes widen to str
    definitions: Json = document["$defs"]
    return dict(sorted(definitions.items()))


def openapi(routes: tuple[Route, ...], *, title: str, asks_keys: bool) -> Json:
    """The OpenAPI 3.1 document of a table; `asks_keys` is false where no key is configured."""
    paths: Json = {}
    for route in routes:
        path = route.path.replace(":path}", "}")
        for method in route.methods:
            paths.setdefault(path, {})[method.lower()] = _operation(route, method, asks_keys=asks_keys)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": "1"},
        "paths": paths,
        "components": {
            "schemas": _schemas(routes),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _field_rows(route: Route) -> str:
    if route.body is None:
        return ""
    rows = []
    for name, info in route.body.model_fields.items():
        need = "required" if info.is_required() else "optional"
        meaning = html.escape(info.description or "")
        rows.append(f"<tr><td><code>{name}</code></td><td>{need}</td><td>{meaning}</td></tr>")
    return f"<table><tr><th>field</th><th></th><th></th></tr>{''.join(rows)}</table>"


def _section(route: Route) -> str:
    head = f"{' '.join(route.methods)} {route.path.replace(':path}', '}')}"
    answer = route.document.answer.__name__ if route.document.answer else route.document.media_type
    return (
        f"<h2><code>{html.escape(head)}</code></h2><p>{html.escape(route.document.summary)}. "
        f"Access: {route.access.value}. Answer: <code>{html.escape(answer)}</code>"
        f"{' or server-sent events' if route.document.streams else ''}.</p>{_field_rows(route)}"
    )


_ADDRESS: Final = "ADDRESS"
_EXAMPLE: Final = f"""curl http://{_ADDRESS}/v1/chat/completions -H 'content-type: application/json' \\
  -d '{{"messages": [{{"role": "user", "content": "Hello"}}]}}'"""


def page(routes: tuple[Route, ...], *, title: str) -> bytes:
    """The page for people; `page_at` puts the address in."""
    sections = "".join(_section(route) for route in routes)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p>The same for machines: <a href=openapi.json>openapi.json</a>. "
        "Errors have one shape: <code>{&quot;error&quot;: {message, type, param, code}}</code>.</p>"
        f"<pre>{html.escape(_EXAMPLE)}</pre>{sections}</html>"
    ).encode()


def page_at(template: bytes, *, address: str) -> bytes:
    """The page with a command that asks `address`, which a client wrote: it is escaped."""
    return template.replace(_ADDRESS.encode(), html.escape(address).encode(), 1)


def routes_for(routes: tuple[Route, ...], *, title: str, access: Access) -> tuple[Route, ...]:
    """The two rows that describe a table, themselves included in what they describe."""
    machine: dict[bool, bytes] = {}
    people: bytes

    async def openapi_json(call: Call) -> Reply | StreamReply:
        return Reply(body=machine[access is Access.ADMIN or not call.services.user_keys.is_empty])

    async def docs(call: Call) -> Reply | StreamReply:
        body = page_at(people, address=call.address)
        return Reply(body=body, content_type=HTML_TYPE, headers=((b"content-security-policy", _CSP),))

    rows = (
        Route(
            path="/openapi.json",
            methods=("GET",),
            access=access,
            serve=openapi_json,
            document=Document(summary="This API, for machines"),
        ),
        Route(
            path="/docs",
            methods=("GET",),
            access=access,
            serve=docs,
            document=Document(summary="This API, for people", media_type="text/html"),
        ),
    )
    for asks_keys in (False, True):
        document = openapi((*routes, *rows), title=title, asks_keys=asks_keys)
        machine[asks_keys] = msgspec.json.encode(document)
    people = page((*routes, *rows), title=title)
    return rows
