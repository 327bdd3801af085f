"""Errors as data: how a `PenstockError` crosses between processes and rooms.

Used by `engine/wire` between processes and by `text/stream` for deltas that carry an error.
"""

from penstock.core import errors
from penstock.core.errors import EngineError, PenstockError
from penstock.core.tokens import ErrorInfo


def error_to_info(error: PenstockError) -> ErrorInfo:
    """The wire form of an error."""
    param = None if error.param is None else _sendable(error.param)
    return ErrorInfo(type(error).__name__, _sendable(error.message), error.code, param, error.retry_after_s)


def _sendable(text: str) -> str:
    """With escapes for halves of characters, which JSON may smuggle in from files and UTF-8 cannot carry."""
    return text.encode("utf-8", "backslashreplace").decode()


def info_to_error(info: ErrorInfo) -> PenstockError:
    """The error that `info` stands for; an unknown kind becomes `EngineError`."""
    kind = getattr(errors, info.kind, EngineError)
    if not (isinstance(kind, type) and issubclass(kind, PenstockError)):
        kind = EngineError
    error: PenstockError = kind(
        info.message, code=info.code, param=info.param, retry_after_s=info.retry_after_s
    )
    return error
