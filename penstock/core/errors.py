"""The errors that cross rooms; each class says what the caller should do.

```
PenstockError
+-- RequestError          yours: change the request (4xx)
|   +-- InvalidParameterError    a field is out of range (400)
|   +-- NotFoundError            no such model or route (404)
|   +-- AuthenticationError      present a valid key (401)
|   +-- PayloadTooLargeError     send less (413)
+-- CapacityError         wait and try again (429, 503 with Retry-After)
|   +-- QueueFullError           the queue is at its limit (429)
|   +-- NotReadyError            loading, draining, restarting or sleeping (503)
+-- EngineError           ours: the fault is in the server (500, 503)
|   +-- GenerateError            this request failed, others are unharmed (500)
|   +-- EngineDeadError          the engine process died; it restarts by itself (503)
+-- StartupError          the server cannot start like this; fix what the line says (exit code)
    +-- CheckpointError          the model folder is incomplete or broken (exit code 3)
    +-- UnsupportedModelError    the architecture is not known here (exit code 3)
```
"""

from typing import ClassVar


class PenstockError(Exception):
    """Root of all errors that Penstock raises on purpose.

    Attributes:
        code: stable machine-readable word, e.g. `context_length_exceeded`.
        param: the request field at fault, dotted path, or None.
        retry_after_s: seconds after which a retry is worthwhile, or None.
    """

    default_code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after_s = retry_after_s


class RequestError(PenstockError):
    """The request is wrong; change it."""

    default_code = "invalid_request"


class InvalidParameterError(RequestError):
    """A field has a wrong type, value or size; the message names field, value and limit."""

    default_code = "invalid_value"


class NotFoundError(RequestError):
    """What the request names does not exist; list what does."""

    default_code = "not_found"


class AuthenticationError(RequestError):
    """No key, or a wrong one; send `Authorization: Bearer <key>`."""

    default_code = "invalid_api_key"


class PayloadTooLargeError(RequestError):
    """The body or headers are larger than the limit; send less."""

    default_code = "payload_too_large"


class CapacityError(PenstockError):
    """There is no room now; wait `retry_after_s` and send the same request again."""

    default_code = "overloaded"


class QueueFullError(CapacityError):
    """The queue is at its limit in requests or tokens; retry later."""

    default_code = "queue_full"


class NotReadyError(CapacityError):
    """The model is loading, draining, restarting or sleeping; retry later or elsewhere."""

    default_code = "not_ready"


class EngineError(PenstockError):
    """The server is at fault; the request may be sent again."""

    default_code = "engine_error"


class GenerateError(EngineError):
    """This request failed inside the engine; other requests are unharmed."""

    default_code = "generate_error"


class EngineDeadError(EngineError):
    """The engine process died; it is being restarted, send the request again."""

    default_code = "engine_restarting"


class StartupError(PenstockError):
    """The server cannot start with this configuration; fix what the message names."""

    default_code = "startup_error"
    exit_code: ClassVar[int] = 2


class CheckpointError(StartupError):
    """The model folder is missing, incomplete or broken; the message names file and tensor."""

    default_code = "bad_checkpoint"
    exit_code = 3


class UnsupportedModelError(StartupError):
    """The model's architecture is not in the registry; the message lists what is."""

    default_code = "unsupported_model"
    exit_code = 3


def no_such_adapter(name: str) -> NotFoundError:
    """The refusal of a LoRA adapter's name that nobody has loaded."""
    return NotFoundError(f"lora_name is {name!r:.140}, there is no such adapter", param="lora_name")
