"""Putting models to sleep over the administrators' listener."""

import pytest

from penstock.core.ids import ModelName
from tests.fakes.http_server import ADMIN_KEY, USER_KEY, bench


class SleepyAdmin:
    """Sleeps as it is told."""

    def __init__(self):
        self.levels = []
        self.is_sleeping = False

    async def sleep(self, level):
        self.levels.append(level)
        self.is_sleeping = True

    async def wake_up(self):
        self.is_sleeping = False


async def ask(admin, method, path, *, key=ADMIN_KEY, **kwargs):
    async with bench(keys=True, admins={ModelName("fake"): admin}) as b:
        return await b.admin.request(method, path, headers={"authorization": f"Bearer {key}"}, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "level"),
    [
        ({}, 1),
        ({"params": {"level": "2"}}, 2),
        ({"params": {"level": "1"}}, 1),
        ({"json": {"level": 2}}, 2),
    ],
    ids=str,
)
async def test_the_level_is_in_the_query_or_in_the_body_or_one(kwargs, level):
    admin = SleepyAdmin()
    reply = await ask(admin, "POST", "/admin/sleep", **kwargs)
    assert (reply.status_code, reply.json()) == (200, {"is_sleeping": True})
    assert admin.levels == [level]


async def test_it_is_told_and_undone():
    admin = SleepyAdmin()
    await admin.sleep(1)
    assert (await ask(admin, "GET", "/admin/is_sleeping")).json() == {"is_sleeping": True}
    assert (await ask(admin, "POST", "/admin/wake_up")).json() == {"is_sleeping": False}
    assert (await ask(admin, "GET", "/admin/is_sleeping")).json() == {"is_sleeping": False}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"params": {"level": "3"}},
        {"params": {"level": "deep"}},
        {"params": {"depth": "1"}},
        {"json": {"level": 0}},
        {"json": {"level": "2"}},
        {"json": {"level": 1}, "params": {"level": "1"}},
    ],
    ids=str,
)
async def test_another_level_is_refused(kwargs):
    admin = SleepyAdmin()
    assert (await ask(admin, "POST", "/admin/sleep", **kwargs)).status_code == 400
    assert admin.levels == []


async def test_a_user_may_not_put_a_model_to_sleep():
    admin = SleepyAdmin()
    assert (await ask(admin, "POST", "/admin/sleep", key=USER_KEY)).status_code == 401
    assert admin.levels == []
