"""A rank beside the first: `python -m penstock.engine.rank_process ADDRESS`.

A child of the process that has the first rank, with a `Follower` in it. It ends with its parent, and its own
end is the end of the group: the next sum that waits for it fails.
"""

import faulthandler
import logging
import signal
import sys
from pathlib import Path

import zmq

from penstock.core.error_info import error_to_info
from penstock.core.errors import EngineDeadError
from penstock.engine.process import EXIT_ENGINE, EXIT_STARTUP, die_with_parent
from penstock.engine.rank_wire import FromRank, RankFailed, RankStart, ToRank, decode_to_rank, encode
from penstock.observe.logs import LogWriter
from penstock.parallel.rank import Rank

log = logging.getLogger("penstock.engine")

Socket = zmq.Socket[bytes]


def _join(start: RankStart) -> Rank:
    from penstock.kernels.devices import choose_device  # imports torch
    from penstock.parallel.collectives import join_ranks

    config = start.config
    logging.getLogger("penstock").setLevel(config.log_level.upper())
    device = choose_device(config.device, kernels=config.kernels, index=start.index).device
    return join_ranks(Path(start.folder), index=start.index, size=config.tensor_parallel_size, device=device)


def _serve(socket: Socket) -> int:
    from penstock.engine.follower import Follower  # imports torch

    def receive() -> ToRank:
        return decode_to_rank(socket.recv())

    def send(message: FromRank) -> None:
        socket.send(encode(message))

    return 0 if Follower(receive=receive, send=send, join=_join).run() else EXIT_STARTUP


def main(argv: list[str]) -> int:
    """Run the process; the return value is its exit code."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    writer = LogWriter()
    writer.start()
    context: zmq.Context[Socket] = zmq.Context.instance()
    socket: Socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.connect(argv[1])
    try:
        return _serve(socket)
    except Exception as error:
        log.exception("a rank failed")
        socket.send(
            encode(RankFailed(error_to_info(EngineDeadError(f"a rank failed: {type(error).__name__}"))))
        )
        return EXIT_ENGINE
    finally:
        socket.close()
        context.term()
        writer.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
