"""The one reader of request bodies: bounded bytes, strict JSON, plain data out.

What JSON readers usually let pass is refused here with the place named: duplicate keys, NaN and Infinity,
numbers beyond a float's range, lone surrogates, NUL characters, deep nesting, text that is not UTF-8.
"""

import json
import math
import re
from typing import Final, NoReturn

from starlette.types import Receive, Scope

from penstock.core.errors import InvalidParameterError, NotReadyError, PayloadTooLargeError
from penstock.server.exchange import ClientGoneError
from penstock.server.limits import Limits

# A string, or the rest of the text if it never ends. Possessive, hence linear.
_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NO_BRACKET: Final = bytes(set(range(256)) - set(b"[]{}"))
_SUSPICIOUS_ESCAPE: Final = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
_BAD_CHARACTER: Final = re.compile("[\x00\ud800-\udfff]")
_MAX_PATH_CHARS: Final = 200
MAX_KEYS: Final = 1024
"""Keys of one object; no object that the server knows has a third as many."""


def _refuse(message: str, *, param: str | None = None) -> NoReturn:
    raise InvalidParameterError(message, code="invalid_json", param=param)


class BodyBudget:
    """Bytes of all bodies that are being read or parsed in this process."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.held_bytes = 0

    def reserve(self, num_bytes: int) -> None:
        """Take `num_bytes`.

        Raises:
            NotReadyError: all bodies together would pass the limit.
        """
        if self.held_bytes + num_bytes > self._limit_bytes:
            raise NotReadyError(
                f"request bodies hold {self.held_bytes} bytes, the limit is {self._limit_bytes}",
                code="body_memory_full",
                retry_after_s=1.0,
            )
        self.held_bytes += num_bytes

    def free(self, num_bytes: int) -> None:
        """Give `num_bytes` back."""
        self.held_bytes -= num_bytes
        assert self.held_bytes >= 0


def check_content_type(scope: Scope) -> None:
    """Refuse bodies that call themselves anything but JSON; no header at all is taken for JSON.

    Raises:
        InvalidParameterError: another media type, or a compressed body.
    """
    for name, value in scope["headers"]:
        if name == b"content-type":
            media = value.partition(b";")[0].strip().lower()
            if media and media != b"application/json" and not media.endswith(b"+json"):
                raise InvalidParameterError(
                    "content-type must be application/json",
                    code="unsupported_media_type",
                    param="content-type",
                )
        elif name == b"content-encoding" and value.strip().lower() not in {b"", b"identity"}:
            raise InvalidParameterError(
                "content-encoding must be identity: compressed bodies are not read",
                code="unsupported_encoding",
                param="content-encoding",
            )


def _too_large(limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"the body is larger than the limit of {limit} bytes")


def _check_announced(scope: Scope, *, limit: int) -> None:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and (len(value) > 18 or int(value) > limit):
            raise _too_large(limit)


async def read_body(scope: Scope, receive: Receive, *, limits: Limits, budget: BodyBudget) -> bytearray:
    """Read a whole body; the caller frees `len(body)` bytes of the budget when it is done with it.

    Raises:
        PayloadTooLargeError: announced or sent more than the limit.
        NotReadyError: all bodies together hold too much.
        ClientGoneError: the client left before the end.
    """
    _check_announced(scope, limit=limits.body_bytes_max)
    body = bytearray()
    try:
        while await _read_piece(receive, body, limit=limits.body_bytes_max, budget=budget):
            pass
    except BaseException:
        budget.free(len(body))
        raise
    return body


async def _read_piece(receive: Receive, body: bytearray, *, limit: int, budget: BodyBudget) -> bool:
    """Append what came; True if more comes."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGoneError
    piece: bytes = message.get("body", b"")
    if len(body) + len(piece) > limit:
        raise _too_large(limit)
    budget.reserve(len(piece))
    body += piece
    return bool(message.get("more_body", False))


def _check_depth(body: bytes | bytearray, *, limit: int) -> None:
    if body.count(b"[") + body.count(b"{") <= limit:
        return
    depth = 0
    for bracket in _STRING.sub(b"", body).translate(None, _NO_BRACKET):
        depth += 1 if bracket in b"[{" else -1
        if depth > limit:
            _refuse(f"the JSON body is nested deeper than the limit of {limit}")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(pairs) > MAX_KEYS:
        _refuse(f"the JSON body has an object with {len(pairs)} keys, the limit is {MAX_KEYS}")
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                _refuse(f"the JSON body has the key {key[:64]!a} twice in one object")
            seen.add(key)
    return result


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse(f"the JSON body has a number beyond the range of a float ({text[:32]})")
    return value


def _constant(text: str) -> NoReturn:
    _refuse(f"the JSON body has the literal {text}, which JSON does not know")


def _check_strings(value: object, *, path: str) -> None:
    if isinstance(value, str):
        bad = _BAD_CHARACTER.search(value)
        if bad:
            kind = "a NUL character" if bad.group() == "\0" else "a lone surrogate"
            _refuse(f"{path or 'the JSON body'} has {kind} at index {bad.start()}", param=path or None)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_strings(key, path=path)
            _check_strings(item, path=f"{path}.{key}"[:_MAX_PATH_CHARS].lstrip("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_strings(item, path=f"{path}.{index}"[:_MAX_PATH_CHARS].lstrip("."))


def parse_json(body: bytes | bytearray, *, depth_max: int = 64) -> object:
    """Parse strict JSON to plain data; costs time linear in the body.

    Args:
        body: the bytes, at most a few megabytes.
        depth_max: most nested arrays and objects.

    Raises:
        InvalidParameterError: what is wrong, and where.
    """
    _check_depth(body, limit=depth_max)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(f"the body is not UTF-8 at byte {error.start}")
    try:
        value: object = json.loads(
            text, object_pairs_hook=_object, parse_float=_float, parse_constant=_constant
        )
    except json.JSONDecodeError as error:
        _refuse(f"the body is not JSON at line {error.lineno}, column {error.colno}")
    except ValueError:
        # The only other ValueError is Python's bound on the digits of an integer.
        _refuse("the JSON body has an integer with more than 4300 digits")
    if _SUSPICIOUS_ESCAPE.search(body):
        _check_strings(value, path="")
    return value
