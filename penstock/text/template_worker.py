"""The process that renders chat templates: jinja2's sandbox inside limits it does not have by itself.

Run as a script by `template_pool`, which talks to it over a socket on file descriptor 0: frames of a 4-byte
length and a msgpack struct. It holds the model's templates, one conversation at a time, nothing else.
Memory is bounded by RLIMIT_AS, the CPU time of one render by an interval timer and RLIMIT_CPU, the output
by counting; a render beyond a limit ends with a `Failure`, or with the process if it hangs inside one
native call, and the pool starts another. Imports nothing of Penstock, so that it starts in tens of
milliseconds.
"""

import contextlib
import functools
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import datetime
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    import jinja2

CONTINUE_MARK: Final = "PENSTOCK_CONTINUES_HERE "
"""Put behind the message to continue; the trailing space shows whether the template trims."""


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """First frame: what to hold and what to allow."""

    templates: dict[str, str]
    special_tokens: dict[str, str]
    max_output_chars: int
    max_cpu_s: float
    max_memory_bytes: int


class Job(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Render one conversation with the template `template`."""

    template: str
    messages: list[dict[str, Any]]  # JSON values, as templates take them
    tools: list[dict[str, Any]] | None  # JSON schemas
    add_generation_prompt: bool
    continue_final_message: bool
    variables: dict[str, Any] = {}  # JSON values
    """More variables, none of which has a name of ours."""


class Rendered(msgspec.Struct, frozen=True, tag=True):
    """The text; empty in the answer to `Setup`."""

    text: str


class Failure(msgspec.Struct, frozen=True, tag=True):
    """`kind` is `template` (it raised), `cpu`, `memory` or `output`; `detail` is for the log only."""

    kind: str
    detail: str


class LimitExceededError(BaseException):
    """Not an `Exception`, so that nothing in a template's way swallows it."""


def read_frame(receive: Callable[[int], bytes]) -> bytes | None:
    """One frame, or None at the end of the stream; `receive` is a socket's `recv`."""
    head = _read_exactly(receive, 4)
    return None if head is None else _read_exactly(receive, int.from_bytes(head))


def _read_exactly(receive: Callable[[int], bytes], num_bytes: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < num_bytes:
        part = receive(min(num_bytes - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)


def make_frame(message: msgspec.Struct) -> bytes:
    """The bytes of one frame."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4) + body


def make_environment() -> "jinja2.Environment":
    """The environment that chat templates expect: trimmed blocks, `tojson`, `raise_exception` and so on."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    import jinja2.sandbox
    import jinja2.utils

    class GenerationTag(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's words for training; here its body is just rendered."""

        tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            body: list[jinja2.nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return [jinja2.nodes.Scope(body)]

    class Namespace(jinja2.utils.Namespace):
        """`namespace()` without names that begin with an underscore."""

        def __setitem__(self, name: str, value: object) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is not allowed")
            super().__setitem__(name, value)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = Namespace
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Positional parameters and no HTML escapes: that is how chat templates use it.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005  # templates mean the local date


class Renderer:
    """The compiled templates; `render` is the obvious part, without the process limits."""

    def __init__(self, setup: Setup) -> None:
        environment = make_environment()
        self._setup = setup
        self._templates = {name: environment.from_string(source) for name, source in setup.templates.items()}

    def render(self, job: Job) -> str:
        """The conversation as the model's prompt.

        Raises:
            Exception: whatever the template raises, or a final message that cannot be continued.
            LimitExceededError: the output is too long.
        """
        messages = [dict(message) for message in job.messages]
        final = _mark_final_message(messages) if job.continue_final_message else None
        text = self._generate(job, messages=messages)
        return text if final is None else _cut_at_mark(text, final=final)

    def _generate(self, job: Job, *, messages: list[dict[str, Any]]) -> str:  # JSON values
        num_chars_left = self._setup.max_output_chars
        parts: list[str] = []
        pieces = self._templates[job.template].generate(
            messages=messages,
            tools=job.tools,
            documents=None,
            add_generation_prompt=job.add_generation_prompt,
            **(job.variables | self._setup.special_tokens),
        )
        for piece in pieces:
            num_chars_left -= len(piece)
            if num_chars_left < 0:
                raise LimitExceededError("output")
            parts.append(piece)
        return "".join(parts)


def _mark_final_message(messages: list[dict[str, Any]]) -> str:  # JSON values
    final = messages[-1].get("content")
    if not isinstance(final, str):
        raise TypeError("the final message has no text to continue")
    messages[-1]["content"] = final + CONTINUE_MARK
    return final


def _cut_at_mark(text: str, *, final: str) -> str:
    """Cut at the mark; if the template trimmed the text, the blanks before the mark go as well."""
    begin = text.rfind(CONTINUE_MARK.strip())
    if begin < 0 or final.strip() not in text:
        raise ValueError("the template does not render the final message as it is")
    head = text[:begin]
    return head if text.startswith(CONTINUE_MARK, begin) else head.rstrip()


def _on_cpu_limit(_signal_number: int, _frame: FrameType | None) -> None:
    raise LimitExceededError("cpu")


def _set_cpu_deadline(max_cpu_s: float) -> None:
    """The kernel ends the process at most 2 s of CPU time after the timer; no native call puts that off."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(time.process_time() + max_cpu_s + 0.5) + 1
    resource.setrlimit(
        resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
    )


def _answer(action: Callable[[], str], *, max_cpu_s: float) -> bytes:
    """Run `action`; whatever it does becomes the frame of a reply."""
    _set_cpu_deadline(max_cpu_s)
    try:
        signal.setitimer(signal.ITIMER_PROF, max_cpu_s)
        try:
            return make_frame(Rendered(action()))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except LimitExceededError as limit:
        failure = Failure(str(limit), "")
    except MemoryError:
        failure = Failure("memory", "")
    except Exception as error:  # noqa: BLE001  # the process edge: any failure of a template is its request's
        detail = f"{type(error).__name__}: {error}"[:500]
        failure = Failure("template", detail.encode(errors="replace").decode())
    return make_frame(failure)


def _limit_process(setup: Setup) -> None:
    """From here on the process can do little more than compute."""
    with contextlib.suppress(ValueError, OSError):
        # Not every system enforces it; the pool's deadline holds everywhere.
        resource.setrlimit(resource.RLIMIT_AS, (setup.max_memory_bytes, setup.max_memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _on_cpu_limit)
    for name in set(os.environ) - {"TZ"}:  # `strftime_now` means the server's time zone
        del os.environ[name]


def serve(connection: socket.socket) -> None:
    """Answer frames until the other end closes."""
    frame = read_frame(connection.recv)
    if frame is None:
        return
    setup = msgspec.msgpack.decode(frame, type=Setup)
    renderers: list[Renderer] = []

    def compile_templates() -> str:
        renderers.append(Renderer(setup))
        return ""

    _limit_process(setup)
    connection.sendall(_answer(compile_templates, max_cpu_s=10 * setup.max_cpu_s))
    decoder = msgspec.msgpack.Decoder(Job)
    while renderers and (frame := read_frame(connection.recv)) is not None:
        render = functools.partial(_render, renderers[0], decoder, frame)
        connection.sendall(_answer(render, max_cpu_s=setup.max_cpu_s))


def _render(renderer: Renderer, decoder: msgspec.msgpack.Decoder[Job], frame: bytes) -> str:
    return renderer.render(decoder.decode(frame))


if __name__ == "__main__":
    with socket.socket(fileno=os.dup(0)) as channel:
        serve(channel)
    sys.exit(0)
