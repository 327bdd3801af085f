"""Ranks as threads of one process: what they compute is as with processes, only their messages stay here."""

import queue
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from penstock.engine.config import EngineConfig
from penstock.engine.follower import Follower
from penstock.engine.rank_wire import (
    FromRank,
    RankFailed,
    RankLoaded,
    RankStart,
    RankStop,
    ToRank,
    decode_to_rank,
    encode,
)
from penstock.engine.runner.rank_processes import StartedRanks
from penstock.parallel.rank import Rank

WAIT_S = 60.0


class Meeting:
    """Where the threads put what they bring to a collective."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=WAIT_S)
        self.brought: list[Tensor | None] = [None] * size

    def rank(self, index: int) -> Rank:
        size = len(self.brought)
        return Rank(index=index, size=size, collectives=ThreadCollectives(self, index))


class ThreadCollectives:
    """As `parallel.rank.Collectives`."""

    def __init__(self, meeting: Meeting, index: int) -> None:
        self._meeting = meeting
        self._index = index

    def all_gather(self, x: Tensor) -> Tensor:
        self._meeting.brought[self._index] = x
        self._meeting.barrier.wait()
        gathered = torch.stack([part for part in self._meeting.brought if part is not None])
        self._meeting.barrier.wait()
        return gathered

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.all_gather(x.float()).sum(dim=0).to(x.dtype)


def run_ranks(work: Callable[[Rank], object], *, size: int = 2) -> None:
    """Let every rank do `work` at the same time; the first error is raised here."""
    meeting = Meeting(size)
    errors: list[Exception] = []

    def run(index: int) -> None:
        try:
            work(meeting.rank(index))
        except Exception as error:  # noqa: BLE001  raised below
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(1, size)]
    for thread in threads:
        thread.start()
    run(0)
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class ThreadRanks(StartedRanks):
    """In place of `StartedRanks`: each other rank is a thread."""

    def __init__(self, config: EngineConfig, *, folder: Path | None) -> None:
        del folder  # they share a process
        self._config = config
        self._meeting = Meeting(self.size)
        self._inboxes: list[queue.Queue[bytes]] = [queue.Queue() for _ in range(1, self.size)]
        self._answers: list[queue.Queue[FromRank]] = [queue.Queue() for _ in range(1, self.size)]
        self._threads = [
            threading.Thread(target=self._follow, args=(index,), daemon=True) for index in range(1, self.size)
        ]
        for index, thread in enumerate(self._threads, start=1):
            self._inboxes[index - 1].put(encode(RankStart(config, index, "")))
            thread.start()

    def _follow(self, index: int) -> None:
        inbox = self._inboxes[index - 1]
        try:
            Follower(
                receive=lambda: decode_to_rank(inbox.get()),
                send=self._answers[index - 1].put,
                join=lambda _: self._meeting.rank(index),
            ).run()
        except Exception:
            self._meeting.barrier.abort()
            raise

    def join(self, *, device: torch.device) -> Rank:
        del device
        return self._meeting.rank(0)

    def wait_loaded(self) -> int:
        num_bytes = 0
        for answers in self._answers:
            answer = answers.get(timeout=WAIT_S)
            assert not isinstance(answer, RankFailed), answer
            assert isinstance(answer, RankLoaded)
            num_bytes += answer.weights_bytes
        return num_bytes

    def tell(self, message: ToRank) -> None:
        for inbox in self._inboxes:
            inbox.put(encode(message))

    def close(self) -> None:
        self.tell(RankStop())
        for thread in self._threads:
            thread.join(WAIT_S)
