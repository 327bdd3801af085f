"""When requests are sent and how long they are said to take, on a clock that jumps."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from penstock.bench import load as load_module
from penstock.bench.client import Failure, RequestRecord
from penstock.bench.load import Counters, Load, LoadResult
from penstock.bench.measure import summarize
from penstock.bench.workload import LoadRequest, Workload, from_lists
from penstock.core.errors import InvalidParameterError
from tests.unit.bench_load.virtual_time import run_virtual

Send = Callable[[LoadRequest, RequestRecord], Awaitable[None]]


async def _alive() -> bool:
    return True


async def _dead() -> bool:
    return False


def _run(
    workload: Workload,
    send: Callable[[Load], Send],
    *,
    is_alive: Callable[[], Awaitable[bool]] = _alive,
    interrupt_s: float | None = None,
    watcher: object = None,
) -> LoadResult:
    async def main() -> LoadResult:
        loop = asyncio.get_running_loop()
        load = Load(workload, is_alive=is_alive, clock=loop.time, watcher=watcher)  # type: ignore[arg-type]
        if interrupt_s is not None:
            loop.call_later(interrupt_s, load.interrupt)
        return await load.run(send(load))

    return run_virtual(main())


def _service(seconds: float, *, num_slots: int = 1000, texts: int = 2) -> Callable[[Load], Send]:
    """A server that takes `seconds` for a request and has `num_slots` places; texts come evenly spaced."""

    def make(load: Load) -> Send:
        slots = asyncio.Semaphore(num_slots)

        async def send(request: LoadRequest, record: RequestRecord) -> None:
            record.sent_s = load.now()
            record.num_prompt_tokens = request.num_prompt_tokens
            try:
                async with slots:
                    for _ in range(texts):
                        await asyncio.sleep(seconds / texts)
                        record.pieces_s.append(load.now())
                        load.on_piece(record)
                record.last_s = load.now()
                record.num_output_tokens = texts
                record.finish_reason = "length"
            except asyncio.CancelledError:
                record.failure = Failure(kind="cancelled", message="")
                raise
            finally:
                record.end_s = load.now()

        return send

    return make


def _workload(num: int, *, every_s: float | None = None, max_concurrency: int | None = None) -> Workload:
    times = None if every_s is None else [i * every_s for i in range(num)]
    return from_lists([[1]] * num, output_lens=[2] * num, arrival_s=times, max_concurrency=max_concurrency)


def test_an_open_loop_sends_when_it_is_due_whatever_the_server_does() -> None:
    result = _run(_workload(5, every_s=1.0), _service(10.0))
    assert [record.sent_s for record in result.records] == pytest.approx([0, 1, 2, 3, 4])
    assert result.max_in_flight == 5
    assert result.duration_s == pytest.approx(14.0)


def test_a_closed_loop_keeps_its_users_busy_and_no_more() -> None:
    result = _run(_workload(6, max_concurrency=2), _service(1.0))
    assert [record.sent_s for record in result.records] == pytest.approx([0, 0, 1, 1, 2, 2])
    assert result.max_in_flight == 2
    assert [record.e2el_s for record in result.records] == pytest.approx([1.0] * 6)


def test_no_coordinated_omission_a_stalled_server_is_charged_with_all_who_wait() -> None:
    """One place, 2 s a request, one request a second: request i waits i seconds longer than the first."""
    result = _run(_workload(5, every_s=1.0), _service(2.0, num_slots=1))
    assert [record.e2el_s for record in result.records] == pytest.approx([2, 3, 4, 5, 6])


def test_a_place_that_must_be_waited_for_counts_in_an_open_loop() -> None:
    result = _run(_workload(4, every_s=0.0, max_concurrency=1), _service(2.0))
    assert [record.e2el_s for record in result.records] == pytest.approx([2, 4, 6, 8])
    assert [record.lateness_s for record in result.records] == pytest.approx([0, 2, 4, 6])
    assert result.num_held == 3
    assert result.max_in_flight == 1


def test_a_closed_loop_holds_nobody() -> None:
    result = _run(_workload(4, max_concurrency=1), _service(2.0))
    assert result.num_held == 0
    assert all(record.lateness_s == 0 for record in result.records)


def test_first_text_gaps_and_time_per_token() -> None:
    result = _run(_workload(1), _service(4.0, texts=4))
    record = result.records[0]
    assert record.ttft_s == pytest.approx(1.0)
    assert record.tpot_s == pytest.approx(1.0)
    assert list(record.pieces_s) == pytest.approx([1, 2, 3, 4])


def test_throughput_is_over_the_time_to_the_last_end() -> None:
    summary = summarize(_run(_workload(6, max_concurrency=2), _service(1.0)))
    assert summary.request_throughput == pytest.approx(2.0)
    assert summary.output_throughput == pytest.approx(4.0)
    assert summary.total_throughput == pytest.approx(6.0)


def test_an_interrupted_run_keeps_what_it_has() -> None:
    result = _run(_workload(10, every_s=1.0), _service(1.5), interrupt_s=3.2)
    assert result.status == "interrupted"
    kinds = [record.failure.kind if record.failure else "ok" for record in result.records]
    assert kinds == ["ok", "ok", "cancelled", "cancelled"]
    summary = summarize(result)
    assert (summary.num_requests, summary.num_sent, summary.num_ok, summary.error_rate) == (10, 4, 2, 0.0)


def _broken(_load: Load) -> Send:
    async def send(_request: LoadRequest, record: RequestRecord) -> None:
        await asyncio.sleep(0.01)
        record.failure = Failure(kind="connect", message="refused")
        record.end_s = _load.now()

    return send


def test_a_server_that_is_gone_ends_the_run_at_once() -> None:
    result = _run(_workload(1000, max_concurrency=4), _broken, is_alive=_dead)
    assert result.status == "server_died"
    assert "refused" in result.detail
    assert len(result.records) == 4


def test_a_broken_connection_to_a_live_server_ends_nothing() -> None:
    result = _run(_workload(20, max_concurrency=4), _broken)
    assert result.is_complete
    assert len(result.records) == 20
    assert summarize(result).failures == {"connect": 20}


def test_users_wait_while_it_is_found_out_whether_the_server_lives() -> None:
    async def slow_answer() -> bool:
        await asyncio.sleep(5.0)
        return False

    result = _run(_workload(1000, max_concurrency=4), _broken, is_alive=slow_answer)
    assert len(result.records) == 4


def test_a_fault_of_ours_is_not_taken_for_the_end_of_the_run() -> None:
    def faulty(_load: Load) -> Send:
        async def send(_request: LoadRequest, _record: RequestRecord) -> None:
            raise ZeroDivisionError

        return send

    with pytest.raises(ZeroDivisionError):
        _run(_workload(3), faulty)


def test_watchers_are_told_ten_times_a_second() -> None:
    class Notes:
        def __init__(self) -> None:
            self.seen: list[tuple[float, int, int, int]] = []

        def tick(self, counters: Counters) -> None:
            self.seen.append(
                (counters.elapsed_s, counters.num_sent, counters.num_done, counters.num_in_flight)
            )

    notes = Notes()
    _run(_workload(2, max_concurrency=1), _service(0.5), watcher=notes)
    assert len(notes.seen) in {9, 10}  # the last tick and the end fall together
    assert notes.seen[2][1:] == (1, 0, 1)
    assert notes.seen[6][1:] == (2, 1, 1)


def test_a_loop_that_is_blocked_shows_in_its_own_probes() -> None:
    result = _run(_workload(2, max_concurrency=1), _service(0.5))
    assert max(result.cost.loop_delays_s) == pytest.approx(0.0, abs=1e-6)
    assert result.cost.cpu_s >= 0


class _FakeLimits:
    RLIMIT_NOFILE = 7
    RLIM_INFINITY = -1

    def __init__(self, soft: int, hard: int) -> None:
        self.limits = (soft, hard)

    def getrlimit(self, _which: int) -> tuple[int, int]:
        return self.limits

    def setrlimit(self, _which: int, limits: tuple[int, int]) -> None:
        self.limits = limits


@pytest.mark.parametrize(
    ("soft", "hard", "num", "max_concurrency", "allowed", "soft_after"),
    [
        (1024, 4096, 100, None, 100, 1024),
        (1024, 4096, 2000, None, 2000, 2064),
        (1024, 2048, 9000, None, 1984, 2048),
        (1024, -1, 9000, None, 4096, 4160),
        (1024, 4096, 9000, 3000, 3000, 3064),
    ],
)
def test_connections_are_as_many_as_files_may_be_open(
    monkeypatch: pytest.MonkeyPatch,
    soft: int,
    hard: int,
    num: int,
    max_concurrency: int | None,
    allowed: int,
    soft_after: int,
) -> None:
    limits = _FakeLimits(soft, hard)
    monkeypatch.setattr(load_module, "resource", limits)
    assert load_module.allow_connections(_workload(num, max_concurrency=max_concurrency)) == allowed
    assert limits.limits[0] == soft_after


def test_more_users_than_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "resource", _FakeLimits(1024, 2048))
    with pytest.raises(InvalidParameterError, match="max_concurrency is 3000, the system's .* allows 1984"):
        load_module.allow_connections(_workload(9000, max_concurrency=3000))


def _refusing(*, num_refused: int, retry_after_s: float) -> Callable[[Load], Send]:
    """A server that restarts: refuses the first requests, then answers each in a second."""

    def make(load: Load) -> Send:
        answer = _service(1.0)(load)

        async def send(request: LoadRequest, record: RequestRecord) -> None:
            if record.index >= num_refused:
                return await answer(request, record)
            record.sent_s = record.end_s = load.now()
            record.failure = Failure(kind="http_503", message="restarting")
            record.retry_after_s = retry_after_s
            return None

        return send

    return make


def test_a_user_who_is_refused_waits_as_long_as_the_server_says() -> None:
    result = _run(_workload(6, max_concurrency=2), _refusing(num_refused=4, retry_after_s=3.0))
    assert [record.sent_s for record in result.records] == pytest.approx([0, 0, 3, 3, 6, 6])
    assert [record.is_ok for record in result.records] == [False] * 4 + [True] * 2


def test_an_open_loop_sends_when_it_is_due_however_it_was_refused() -> None:
    result = _run(_workload(4, every_s=1.0), _refusing(num_refused=2, retry_after_s=30.0))
    assert [record.sent_s for record in result.records] == pytest.approx([0, 1, 2, 3])
