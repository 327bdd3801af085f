"""Several ranks that compute one model: the first in this process, each other in a child.

Every plan goes to all of them; each computes its part of every layer, and sums over the ranks put the parts
together. The first draws and answers. A rank that dies takes the group with it: the step under way fails, the
engine ends, and the supervisor starts it again.

`engine/build` makes it where `tensor_parallel_size` is above 1.
"""

import contextlib
import subprocess
import sys
import weakref
from collections.abc import Collection
from pathlib import Path
from typing import Final

import msgspec
import torch
import zmq

from penstock.core.error_info import info_to_error
from penstock.core.errors import EngineDeadError, StartupError
from penstock.core.ids import SequenceId
from penstock.engine.config import EngineConfig
from penstock.engine.owned_folder import PREFIX, OwnedFolder
from penstock.engine.rank_wire import (
    RankBuild,
    RankFailed,
    RankStart,
    RankStep,
    RankWarmUp,
    ToRank,
    decode_from_rank,
    encode,
)
from penstock.engine.runner.rank_group import LocalRank
from penstock.engine.runner.runner import Runner
from penstock.engine.runner.step_handle import StepHandle
from penstock.engine.sampling.masks import MaskSource
from penstock.engine.scheduler.cost import TimedStep
from penstock.engine.scheduler.plan import StepPlan, StepResult
from penstock.parallel.collectives import join_ranks, leave_ranks
from penstock.parallel.rank import Rank

LOAD_POLL_MS: Final = 1000
"""How often a rank that loads is looked after."""
END_S: Final = 5.0
"""Time that a killed rank gets to be gone."""


class OtherRank:
    """A child process with one rank, and the socket to it."""

    def __init__(self, index: int, *, folder: Path) -> None:
        """Start it; its first message is yet to be sent."""
        self._index = index
        address = f"ipc://{folder}/rank-{index}"
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        self.process = subprocess.Popen(  # noqa: S603  our own module
            [sys.executable, "-m", "penstock.engine.rank_process", address],
            stdin=subprocess.DEVNULL,
        )
        self._finalizer = weakref.finalize(self, _end, self.process, self._socket)

    def send(self, message: bytes) -> None:
        """Hand over an encoded message.

        Raises:
            EngineDeadError: the rank has gone.
        """
        code = self.process.poll()
        if code is not None:
            raise EngineDeadError(f"rank {self._index} of the engine has ended with exit code {code}")
        self._socket.send(message)

    def wait_loaded(self) -> int:
        """Bytes of its weights, once they are there.

        Raises:
            StartupError: it could not load, or has gone.
        """
        while not self._socket.poll(LOAD_POLL_MS):
            if self.process.poll() is not None:
                raise StartupError(f"rank {self._index} ended while it loaded")
        message = decode_from_rank(self._socket.recv())
        if isinstance(message, RankFailed):
            raise StartupError(f"rank {self._index}: {info_to_error(message.error).message}")
        return message.weights_bytes

    def close(self) -> None:
        """Kill and reap; safe to call twice."""
        self._finalizer()


def _end(process: "subprocess.Popen[bytes]", socket: "zmq.Socket[bytes]") -> None:
    """Also what the collector and the interpreter's end do for a rank that nobody closed."""
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    socket.close(linger=0)


class StartedRanks:
    """The ranks of one engine, from the first sign of life on."""

    def __init__(self, config: EngineConfig, *, folder: Path | None) -> None:
        """Start the others; they meet in `join`, in a new folder below `folder`."""
        self._config = config
        self._folder = OwnedFolder(prefix=f"{PREFIX}ranks-", parent=folder)
        meeting = self._folder.path
        self.others = [OtherRank(index, folder=meeting) for index in range(1, config.tensor_parallel_size)]
        for index, other in enumerate(self.others, start=1):
            other.send(encode(RankStart(config, index, str(meeting))))
        # One group at a time: who drops this engine without closing it must be able to start the next.
        self._finalizer = weakref.finalize(self, leave_ranks)
        self._finalizer.atexit = False

    @property
    def size(self) -> int:
        """Ranks, the first included."""
        return self._config.tensor_parallel_size

    def join(self, *, device: torch.device) -> Rank:
        """Meet them, as the first rank, which computes on `device`."""
        return join_ranks(self._folder.path, index=0, size=self.size, device=device)

    def wait_loaded(self) -> int:
        """Bytes of the others' weights.

        Raises:
            StartupError: as `OtherRank.wait_loaded`.
        """
        return sum(other.wait_loaded() for other in self.others)

    def tell(self, message: ToRank) -> None:
        """Send a message to all others.

        Raises:
            EngineDeadError: one has gone.
        """
        data = encode(message)
        for other in self.others:
            other.send(data)

    def close(self) -> None:
        """End the others and leave nothing behind."""
        for other in self.others:
            other.close()
        self._finalizer()
        self._folder.close()


class SeveralRanks:
    """A `RankGroup` of several processes."""

    def __init__(self, runner: Runner, *, started: StartedRanks, num_blocks: int) -> None:
        """Let the others reserve as many blocks as the first."""
        self._first = LocalRank(runner)
        self.started = started
        started.tell(RankBuild(num_blocks))

    @property
    def buffer_bytes(self) -> int:
        """See `RankGroup`; the others hold as much as the first."""
        return self._first.buffer_bytes * self.started.size

    def warm_up(
        self, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
    ) -> list[TimedStep]:
        """See `RankGroup`."""
        self.started.tell(RankWarmUp(max_num_seqs, max_num_batched_tokens, max_model_len))
        return self._first.warm_up(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
        )

    def launch(self, plan: StepPlan) -> StepHandle:
        """See `RankGroup`."""
        if plan.has_work or plan.block_copies or plan.blocks_to_zero:
            # What is left out is for the draws.
            bare = msgspec.structs.replace(plan, new_sequences=[], forced_tokens=[], finished_seq_ids=[])
            self.started.tell(RankStep(bare))
        return self._first.launch(plan)

    def draw(
        self, handle: StepHandle, *, masks: MaskSource | None = None, void: Collection[SequenceId] = ()
    ) -> None:
        """See `RankGroup`; the others draw nothing, so no plan may hold a `PENDING_TOKEN`."""
        self._first.draw(handle, masks=masks, void=void)

    def collect(self, handle: StepHandle) -> StepResult:
        """See `RankGroup`."""
        return self._first.collect(handle)

    @property
    def can_sleep(self) -> bool:
        """See `RankGroup`."""
        return False

    def sleep(self) -> None:
        """See `RankGroup`; `engine/sleep` has refused it: the other ranks would keep what they hold."""
        raise AssertionError("ranks in several processes sleep by ending")

    def wake_up(self) -> None:
        """See `RankGroup`."""
        raise AssertionError("ranks in several processes sleep by ending")

    def close(self) -> None:
        """See `RankGroup`."""
        self._first.close()
        self.started.close()
