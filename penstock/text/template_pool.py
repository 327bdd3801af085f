"""A few recyclable processes that render chat templates, and the deadlines that hold whatever they do.

A call is: pick an idle worker, send a frame, wait for one. A worker that dies, hangs or overruns is killed
and replaced; a call that lost its worker for no fault of the template (killed or stopped from outside) is
tried once more. Used by `chat_template`; the other end is `template_worker`.
"""

import contextlib
import logging
import queue
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Final

import msgspec

from penstock.core.errors import CheckpointError, GenerateError, InvalidParameterError
from penstock.text import template_worker
from penstock.text.template_worker import Failure, Job, Rendered, Setup, make_frame, read_frame

logger: Final = logging.getLogger(__name__)

_DECODER: Final[msgspec.msgpack.Decoder[Rendered | Failure]] = msgspec.msgpack.Decoder(Rendered | Failure)


class TemplateLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one render and of the pool."""

    max_output_chars: int = 1 << 20
    """Characters that one render may produce; beyond it the request is refused."""
    max_cpu_s: float = 0.25
    """CPU seconds of one render (compiling: ten times that); beyond it the request is refused."""
    max_wall_s: float = 2.0
    """Seconds until the answer; beyond it the worker is replaced and the call tried once more.
    Much longer than the CPU time, since the machine may be busy; it is for workers that hang."""
    max_memory_bytes: int = 256 << 20
    """Address space of a worker; beyond it the request is refused."""
    max_start_s: float = 20.0
    """Seconds for a worker to start and compile."""
    num_workers: int = 1
    """Processes; each costs about 20 MB."""
    max_waiting: int = 1024
    """Conversations that may be rendered or wait for it; beyond it `QueueFullError`."""


class WorkerLostError(Exception):
    """The worker died or did not answer in time."""


class TemplateWorker:
    """A place for one process and the socket to it; used by one call at a time.

    `launch` starts a process if there is none, `kill` ends it; after a `WorkerLostError` there is none.
    """

    def __init__(self, setup_frame: bytes, *, max_start_s: float) -> None:
        self._setup_frame = setup_frame
        self._max_start_s = max_start_s
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._ready_by_s = 0.0
        self._is_ready = False

    @property
    def pid(self) -> int | None:
        """Process id, None if there is no process."""
        return None if self._process is None else self._process.pid

    def launch(self) -> None:
        """Start the process; returns before it is ready, `wait_ready` waits.

        Raises:
            WorkerLostError: the system gives no process.
        """
        if self._process is not None:
            return
        self._ready_by_s = time.monotonic() + self._max_start_s
        self._is_ready = False
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = _start_process(theirs)
            except OSError as error:
                ours.close()
                raise WorkerLostError(f"no process: {error.strerror}") from None
        self._socket = ours

    def wait_ready(self) -> None:
        """Launch and wait until the templates are compiled.

        Raises:
            CheckpointError: a template does not compile.
            WorkerLostError: the process does not start.
        """
        self.launch()
        if self._is_ready:
            return
        reply = self._exchange(self._setup_frame, deadline_s=self._ready_by_s)
        if isinstance(reply, Failure):
            self.kill()
            raise CheckpointError(f"the chat template does not compile: {reply.detail or reply.kind}")
        self._is_ready = True

    def render(self, frame: bytes, *, max_wall_s: float) -> Rendered | Failure:
        """Send a job, wait for the reply.

        Raises:
            WorkerLostError: no reply in time.
        """
        self.wait_ready()
        return self._exchange(frame, deadline_s=time.monotonic() + max_wall_s)

    def kill(self) -> None:
        """End the process, if there is one, and wait for its end."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._socket = None

    def _exchange(self, frame: bytes, *, deadline_s: float) -> Rendered | Failure:
        try:
            reply = self._send_and_receive(frame, deadline_s=deadline_s)
        except OSError as error:
            self.kill()
            raise WorkerLostError(type(error).__name__) from None
        if reply is None:
            self.kill()
            raise WorkerLostError("the process ended")
        return _DECODER.decode(reply)

    def _send_and_receive(self, frame: bytes, *, deadline_s: float) -> bytes | None:
        connection = self._socket
        assert connection is not None

        def receive(num_bytes: int) -> bytes:
            connection.settimeout(max(deadline_s - time.monotonic(), 0.001))
            return connection.recv(num_bytes)

        connection.settimeout(max(deadline_s - time.monotonic(), 0.001))
        connection.sendall(frame)
        return read_frame(receive)


def _start_process(channel: socket.socket) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(  # noqa: S603  # our own interpreter and our own file
        [sys.executable, "-P", template_worker.__file__],
        stdin=channel.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in the terminal is the server's to handle
    )


class TemplatePool:
    """`num_workers` workers behind a queue; every method may be called from any thread."""

    def __init__(self, setup: Setup, *, limits: TemplateLimits) -> None:
        self._limits = limits
        self._idle: queue.SimpleQueue[TemplateWorker] = queue.SimpleQueue()
        self._is_closed = False
        self.num_losses = 0
        """Workers lost or recycled since the start."""
        frame = make_frame(setup)
        self.workers = tuple(
            TemplateWorker(frame, max_start_s=limits.max_start_s) for _ in range(limits.num_workers)
        )
        for worker in self.workers:
            self._idle.put(worker)

    def start(self) -> None:
        """Launch the idle workers without waiting for them; the first render then finds them ready.

        Raises:
            CheckpointError: the system gives no process.
        """
        for _ in self.workers:  # the queue turns: each comes up once
            with self._worker() as worker, _at_start():
                worker.launch()

    def wait_ready(self) -> None:
        """Wait until the workers have compiled the templates.

        Raises:
            CheckpointError: a template does not compile, or no worker starts.
        """
        for _ in self.workers:
            with self._worker() as worker, _at_start():
                worker.wait_ready()

    def render(self, job: Job) -> str:
        """Render a conversation; blocks, at most about twice `max_wall_s` once a worker is free.

        Raises:
            InvalidParameterError: the template refuses the conversation, or it breaks a limit.
            GenerateError: the worker was lost twice, or the pool is closed.
        """
        frame = _job_frame(job)
        reply = self._try_render(frame) or self._try_render(frame)
        if reply is None:
            raise GenerateError("the conversation could not be rendered; the request may be sent again")
        if isinstance(reply, Failure):
            raise self._refusal(reply)
        return reply.text

    def close(self) -> None:
        """End all workers; waits for renders in progress, later ones fail."""
        self._is_closed = True
        for worker in [self._idle.get() for _ in self.workers]:
            worker.kill()
            self._idle.put(worker)

    @contextlib.contextmanager
    def _worker(self) -> Iterator[TemplateWorker]:
        worker = self._idle.get()
        try:
            if self._is_closed:
                raise GenerateError("the server is shutting down")
            yield worker
        finally:
            self._idle.put(worker)

    def _try_render(self, frame: bytes) -> Rendered | Failure | None:
        """None if the worker was lost; it has been replaced then."""
        with self._worker() as worker:
            try:
                reply = worker.render(frame, max_wall_s=self._limits.max_wall_s)
            except WorkerLostError as error:
                self._recycle(worker, reason=str(error))
                return None
            if isinstance(reply, Failure) and reply.kind != "template":
                self._recycle(worker, reason=reply.kind)
            return reply

    def _recycle(self, worker: TemplateWorker, *, reason: str) -> None:
        logger.warning("a chat template worker is replaced: %s", reason)
        self.num_losses += 1
        worker.kill()
        with contextlib.suppress(WorkerLostError):
            # The next call tries again if the system gives no process now.
            worker.launch()

    def _refusal(self, failure: Failure) -> InvalidParameterError:
        limits = self._limits
        by_kind = {
            "cpu": f"messages took more than the limit of {limits.max_cpu_s:g} s to render",
            "memory": f"messages took more than the limit of {limits.max_memory_bytes} bytes to render",
            "output": f"messages render to more than the limit of {limits.max_output_chars} characters",
        }
        if failure.kind in by_kind:
            return InvalidParameterError(by_kind[failure.kind], code="template_limit", param="messages")
        logger.info("a chat template refused a conversation: %s", failure.detail)
        return InvalidParameterError(
            "messages do not fit the model's chat template", code="template_error", param="messages"
        )


@contextlib.contextmanager
def _at_start() -> Iterator[None]:
    try:
        yield
    except WorkerLostError as error:
        raise CheckpointError(f"the chat template process does not start: {error}") from None


def _job_frame(job: Job) -> bytes:
    try:
        return make_frame(job)
    except UnicodeEncodeError:
        raise InvalidParameterError(
            "messages or tools hold a lone surrogate, they must be valid Unicode", param="messages"
        ) from None
    except (OverflowError, RecursionError, TypeError, ValueError):
        raise InvalidParameterError(
            "messages or tools hold a number beyond 64 bits or nest too deeply", param="messages"
        ) from None
