"""An exchange ends by itself, or is stopped with a reason; what it awaited has then ended."""

import asyncio

import pytest

from penstock.server.exchange import ClientGoneError, Exchange, InFlight


class Wire:
    """`receive` of a connection whose client leaves when told."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> dict:
        await self.gone.wait()
        return {"type": "http.disconnect"}


class Work:
    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.ended = False

    async def forever(self) -> None:
        try:
            self.started.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.ended = True


async def test_work_that_ends_gives_its_result_and_leaves_no_watcher():
    async def work() -> int:
        return 7

    assert await Exchange().run(work(), receive=Wire().receive) == 7
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1


async def test_a_client_that_leaves_ends_the_work_before_run_returns():
    wire, work = Wire(), Work()
    task = asyncio.create_task(Exchange().run(work.forever(), receive=wire.receive))
    await work.started.wait()
    wire.gone.set()
    with pytest.raises(ClientGoneError):
        await task
    assert work.ended


async def test_a_stop_raises_its_reason_and_the_first_reason_stays():
    exchange, work = Exchange(), Work()
    task = asyncio.create_task(exchange.run(work.forever(), receive=Wire().receive))
    await work.started.wait()
    exchange.stop(ValueError("first"))
    exchange.stop(ValueError("second"))
    with pytest.raises(ValueError, match="first"):
        await task
    assert work.ended


async def test_a_stop_before_the_run_is_kept():
    exchange, work = Exchange(), Work()
    exchange.stop(ValueError("early"))
    with pytest.raises(ValueError, match="early"):
        await exchange.run(work.forever(), receive=Wire().receive)
    assert not work.started.is_set()


async def test_a_stop_is_no_cancellation_of_the_task_itself():
    exchange, work = Exchange(), Work()

    async def handler() -> str:
        try:
            await exchange.run(work.forever(), receive=Wire().receive)
        except ValueError:
            await asyncio.sleep(0)
        return "answered"

    task = asyncio.create_task(handler())
    await work.started.wait()
    exchange.stop(ValueError())
    assert await task == "answered"


async def test_cancelling_the_task_from_outside_stays_a_cancellation():
    work = Work()
    task = asyncio.create_task(Exchange().run(work.forever(), receive=Wire().receive))
    await work.started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.ended


async def test_work_that_ends_well_in_spite_of_a_stop_does_not_leave_its_task_cancelled():
    exchange, started = Exchange(), asyncio.Event()

    async def work() -> int:
        try:
            started.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return 7

    async def handler() -> int:
        result = await exchange.run(work(), receive=Wire().receive)
        async with asyncio.timeout(10):
            await asyncio.sleep(0)
        assert asyncio.current_task().cancelling() == 0
        return result

    task = asyncio.create_task(handler())
    await started.wait()
    exchange.stop(ValueError())
    assert await task == 7


async def test_in_flight_counts_waits_and_stops():
    in_flight = InFlight()
    await in_flight.wait_empty()
    exchange, work = Exchange(), Work()
    in_flight.add(exchange)
    task = asyncio.create_task(exchange.run(work.forever(), receive=Wire().receive))
    await work.started.wait()
    assert len(in_flight) == 1
    in_flight.stop_all(ValueError("stopped"))
    with pytest.raises(ValueError, match="stopped"):
        await task
    in_flight.remove(exchange)
    await in_flight.wait_empty()
