"""The unmodified `openai` client for Node against a real socket; one script per scenario."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from tests.fakes.http_server import USER_KEY, Running, running
from tests.fakes.model_client import FakeModelClient

FOLDER = Path(__file__).parents[2] / "clients" / "node"
SCENARIOS = ["chat", "chat_stream", "completion", "models", "errors"]

pytestmark = [
    pytest.mark.node,
    pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed"),
    pytest.mark.skipif(
        not (FOLDER / "node_modules").is_dir(), reason="run make test-clients, it installs the client"
    ),
]


async def run_script(server: Running, name: str) -> None:
    process = await asyncio.create_subprocess_exec(
        "node",
        f"{name}.mjs",
        cwd=FOLDER,
        env=os.environ
        | {
            "PENSTOCK_BASE_URL": server.addresses.public,
            "PENSTOCK_API_KEY": USER_KEY,
            "PENSTOCK_MODEL": "fake",
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, output.decode()


@pytest.mark.parametrize("name", SCENARIOS)
async def test_node_client(name):
    async with running(keys=True) as server:
        await run_script(server, name)


async def test_leaving_a_loop_cancels_the_request():
    model = FakeModelClient(hold_after=3)
    async with running(model, keys=True) as server:
        await run_script(server, "abort")
        await asyncio.wait_for(model.ended.wait(), 10)
        assert len(model.cancelled) == 1


def test_every_script_is_run():
    scripts = {path.stem for path in FOLDER.glob("*.mjs")}
    assert scripts == {*SCENARIOS, "abort", "client"}
