"""One engine process and the socket to it.

A restart makes a new `EngineProcess`, so that nothing an old one sent can arrive late. It decides nothing:
`supervisor` starts, kills and replaces it.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

import zmq
import zmq.asyncio

from penstock.core.errors import StartupError
from penstock.engine.config import EngineConfig
from penstock.engine.wire import FromEngine, Start, ToEngine, decode_from_engine, encode

MAX_LAST_MESSAGES: Final = 1000
"""Messages read after a child's end before its socket is given up."""
STACK_DUMP_S: Final = 0.1
"""Time a hung child gets to write its stack before it is killed."""
CHILD_ENVIRONMENT: Final = {"THP_MEM_ALLOC_ENABLE": "1", "GOMP_SPINCOUNT": "1000"}
"""Defaults under the operator's own environment. torch takes huge pages for its tensors: fresh 4 KiB pages
made a 39 MB logits tensor cost 20 ms, not 6. OpenMP's threads sleep soon at a barrier: where the API process
or a neighbour needs a core, spinning made steps up to 13 times slower; alone it saves a third."""

log = logging.getLogger("penstock.supervisor")


class EngineProcess:
    """See the module.

    Args:
        folder: private (0700) folder for the socket.
        generation: number of this process, for the socket's name.
        on_message: called in the event loop with every message, in order.
    """

    def __init__(self, *, folder: Path, generation: int, on_message: Callable[[FromEngine], None]) -> None:
        self._address = f"ipc://{folder}/engine-{generation}"
        self._on_message = on_message
        self._socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._unsent: set[asyncio.Future[object]] = set()

    @property
    def pid(self) -> int:
        """Process id; valid once spawned."""
        assert self._process is not None
        return self._process.pid

    async def spawn(self, config: EngineConfig) -> None:
        """Start the child and hand it its config; returns before it has loaded.

        Raises:
            StartupError: no socket or no process could be made.
        """
        try:
            self._socket.bind(self._address)
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "penstock.engine.process",
                self._address,
                str(os.getpid()),
                stdin=asyncio.subprocess.DEVNULL,
                env={**CHILD_ENVIRONMENT, **os.environ},
            )
        except OSError as error:
            raise StartupError(f"the engine process cannot be started: {error.strerror}") from error
        self._reader = asyncio.create_task(self._read(), name="engine-reader")
        self.send(Start(config))

    def send(self, message: ToEngine) -> None:
        """Hand a message to the socket; a message to a closed one is lost with its engine."""
        if self._socket.closed:
            return
        # pyzmq's stub calls it Awaitable; the asyncio socket returns a Future.
        sent = cast("asyncio.Future[object]", self._socket.send(encode(message)))
        if not sent.done():
            self._unsent.add(sent)
            sent.add_done_callback(self._unsent.discard)

    async def wait(self) -> int:
        """Exit code of the child, after its last message has been read."""
        assert self._process is not None
        code = await self._process.wait()
        await self._read_rest()
        return code

    def kill(self) -> None:
        """SIGKILL; does nothing if it has ended."""
        self._signal(signal.SIGKILL)

    async def kill_hung(self) -> None:
        """Let the child write its stack to the log, then kill it."""
        self._signal(signal.SIGUSR1)
        await asyncio.sleep(STACK_DUMP_S)
        self.kill()

    async def close(self) -> None:
        """Kill, reap and close the socket."""
        self.kill()
        if self._process is not None:
            await self._process.wait()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        self._socket.close(linger=0)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _read(self) -> None:
        try:
            while True:
                self._on_message(decode_from_engine(await self._socket.recv()))
        except Exception:
            # Without its reader the engine would look hung: replace it now, and say why.
            log.exception("a message of the engine could not be handled, the engine is killed")
            self.kill()

    async def _read_rest(self) -> None:
        """Give the reader a moment for what the child sent before it ended."""
        for _ in range(MAX_LAST_MESSAGES):
            if self._socket.closed or not await self._socket.poll(timeout=20):
                return
            await asyncio.sleep(0)
