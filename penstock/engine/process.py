"""The engine process: `python -m penstock.engine.process ADDRESS PARENT_PID`.

A direct child of the API process. It connects to ADDRESS (`ipc://` in a 0700 folder), takes its config
from the first message, loads, warms up, reports `Started` and turns the loop. It ends with its parent.
"""

import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import zmq

from penstock.core.error_info import error_to_info
from penstock.core.errors import EngineDeadError, StartupError
from penstock.engine.wire import (
    Fatal,
    FromEngine,
    Loading,
    Start,
    Started,
    ToEngine,
    decode_to_engine,
    encode,
)
from penstock.observe.logs import LogWriter
from penstock.observe.memory import settle

EXIT_STARTUP: Final = 3
EXIT_ENGINE: Final = 70
IDLE_POLL_MS: Final = 10_000
"""An engine that hears nothing for so long, not even a ping, looks whether its parent is alive."""
START_POLL_MS: Final = 30_000
"""The config must arrive within this time."""
MAX_RINGS: Final = 4096
"""Wake-ups taken at once."""
PR_SET_PDEATHSIG: Final = 1

log = logging.getLogger("penstock.engine")


class ZmqChannel:
    """The engine's end of the socket pair."""

    def __init__(self, address: str, *, parent_pid: int) -> None:
        self._parent_pid = parent_pid
        self.folder = Path(address.removeprefix("ipc://")).parent
        """Private; the API process removes it, however this one ends."""
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(address)
        self._alarm, self._bell = os.pipe()
        os.set_blocking(self._alarm, False)
        os.set_blocking(self._bell, False)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._alarm, zmq.POLLIN)

    def receive(self, *, block: bool) -> Iterable[ToEngine]:
        """See `loop.Channel`."""
        if block:
            ready = dict(self._poller.poll(IDLE_POLL_MS))
            if not ready:
                self._end_with_parent()
                return
            if self._alarm in ready:
                os.read(self._alarm, MAX_RINGS)
        while True:
            try:
                yield decode_to_engine(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return

    def wake(self) -> None:
        """See `loop.Channel`."""
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._bell, b"!")

    def receive_start(self) -> Start:
        """Wait for the first message, while there is a parent that could send it."""
        while not self._socket.poll(START_POLL_MS):
            self._end_with_parent()
        message = decode_to_engine(self._socket.recv())
        assert isinstance(message, Start), "the first message is Start"
        return message

    def send(self, message: FromEngine) -> None:
        """See `loop.Channel`."""
        self._socket.send(encode(message))

    def close(self) -> None:
        """Flush what was sent and end."""
        self._socket.close()
        zmq.Context.instance().term()

    def _end_with_parent(self) -> None:
        if os.getppid() != self._parent_pid:
            log.warning("the API process has gone, the engine ends")
            sys.exit(0)


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies (Linux; elsewhere the idle poll sees it)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(channel: ZmqChannel) -> int:
    start = channel.receive_start()
    logging.getLogger("penstock").setLevel(start.config.log_level.upper())
    # torch is imported only now, so that a wrong command line fails fast
    import torch

    from penstock.engine.build import build_core
    from penstock.engine.loop import EngineLoop

    def on_progress(done_bytes: int, total_bytes: int) -> None:
        channel.send(Loading(done_bytes, total_bytes))

    try:
        core = build_core(start.config, on_progress=on_progress, folder=channel.folder)
    except StartupError as error:
        channel.send(Fatal(error_to_info(error)))
        return EXIT_STARTUP
    settle()
    channel.send(Started(core.info))
    with torch.inference_mode():
        EngineLoop(core, channel).run()
    return 0


def main(argv: list[str]) -> int:
    """Run the process; the return value is its exit code."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the supervisor asks before it kills
    # Ctrl-C in a terminal reaches the whole group; only the API process decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    writer = LogWriter()
    writer.start()
    channel = ZmqChannel(argv[1], parent_pid=int(argv[2]))
    try:
        return _serve(channel)
    except Exception as error:
        log.exception("the engine failed")
        channel.send(Fatal(error_to_info(EngineDeadError(f"the engine failed: {type(error).__name__}"))))
        return EXIT_ENGINE
    finally:
        channel.close()
        writer.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
