"""The rendering process: its bounds hold, and a lost worker costs nobody else anything."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from penstock.core.errors import CheckpointError, GenerateError, InvalidParameterError, QueueFullError
from penstock.core.text import GenerateRequest, Message
from penstock.text import template_pool
from penstock.text.chat_template import ChatTemplate
from penstock.text.template_pool import TemplateLimits, TemplatePool, WorkerLostError
from penstock.text.template_worker import Job, Setup, make_frame

MIB = 1 << 20
LIMITS = TemplateLimits(max_output_chars=1000, max_cpu_s=0.1, max_wall_s=4.0, max_memory_bytes=128 * MIB)

# Each runs only if the conversation says so, else the compiler would fold it into a constant.
HOSTILE = {
    "loop": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "template_limit",
    ),
    "memory": ("{{ ('a' * (messages[0].size * 10**9)) | length }}", "template_limit"),
    "memory in pieces": (
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "template_limit",
    ),
    "output": ("{% for i in range(99999) %}{{ 'words ' }}{% endfor %}", "template_limit"),
    "output in one piece": ("{{ 'a' * (messages[0].size * 5000) }}", "template_limit"),
    "padding": ("{{ ('%' ~ messages[0].size ~ '000000000d') | format(1) }}", "template_limit"),
    "recursion": ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "template_error"),
    "range": ("{{ range(messages[0].size * 10**8) | list }}", "template_error"),
}
SOURCES = {
    "default": "{{ messages[0].content }}",
    # Comparing two lists that share their halves takes 2**60 steps and looks at no signal.
    "stuck": (
        "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}"
        "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}"
    ),
} | {name: source for name, (source, _) in HOSTILE.items()}


def make_job(template="default", content="hello"):
    return Job(
        template=template,
        messages=[{"role": "user", "content": content, "size": 1}],
        tools=None,
        add_generation_prompt=True,
        continue_final_message=False,
    )


def make_pool(sources=SOURCES, limits=LIMITS):
    setup = Setup(
        templates=dict(sources),
        special_tokens={},
        max_output_chars=limits.max_output_chars,
        max_cpu_s=limits.max_cpu_s,
        max_memory_bytes=limits.max_memory_bytes,
    )
    return TemplatePool(setup, limits=limits)


@pytest.fixture(scope="module")
def pool():
    pool = make_pool()
    pool.wait_ready()
    yield pool
    pool.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_render_is_refused_within_its_bounds_and_the_next_one_works(pool, name):
    began_s = time.monotonic()
    with pytest.raises(InvalidParameterError) as caught:
        pool.render(make_job(name))
    assert time.monotonic() - began_s < LIMITS.max_wall_s
    assert (caught.value.code, caught.value.param) == (HOSTILE[name][1], "messages")
    assert pool.render(make_job(content=name)) == name


def test_a_render_stuck_in_one_native_call_is_killed_at_the_deadline():
    pool = make_pool(limits=TemplateLimits(max_wall_s=0.3))
    with pytest.raises(GenerateError):
        pool.render(make_job("stuck"))
    assert pool.num_losses == 2
    assert None not in {worker.pid for worker in pool.workers}
    pool.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_killed_or_stopped_from_outside_is_replaced_unnoticed(number):
    pool = make_pool(limits=TemplateLimits(max_wall_s=0.7))
    pool.wait_ready()
    (worker,) = pool.workers
    before = worker.pid
    os.kill(before, number)
    assert pool.render(make_job()) == "hello"
    assert worker.pid not in (before, None)
    pool.close()


def test_the_memory_of_a_worker_stays_under_its_limit(pool):
    (worker,) = pool.workers
    for name in ("memory", "memory in pieces"):
        with pytest.raises(InvalidParameterError):
            pool.render(make_job(name))
    pool.render(make_job())
    lines = Path(f"/proc/{worker.pid}/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    assert int(fields["VmPeak"].split()[0]) * 1024 <= LIMITS.max_memory_bytes


def test_a_worker_holds_no_file_or_socket_but_its_own(pool):
    (worker,) = pool.workers
    pool.render(make_job())
    links = [str(entry.readlink()) for entry in Path(f"/proc/{worker.pid}/fd").iterdir()]
    assert all(link.startswith("socket:") or link == "/dev/null" for link in links)
    assert len({link for link in links if link.startswith("socket:")}) == 1


def test_a_template_that_does_not_compile_stops_the_start_with_one_line():
    pool = make_pool({"default": "{% for %}"})
    with pytest.raises(
        CheckpointError, match="the chat template does not compile: TemplateSyntaxError"
    ) as caught:
        pool.wait_ready()
    assert "\n" not in caught.value.message
    pool.close()


def test_a_worker_that_cannot_start_is_a_startup_error(monkeypatch):
    def refuse(channel):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(template_pool, "_start_process", refuse)
    pool = make_pool()
    with pytest.raises(CheckpointError, match="does not start: no process"):
        pool.start()
    with pytest.raises(GenerateError):
        pool.render(make_job())
    monkeypatch.undo()
    assert pool.render(make_job()) == "hello"
    pool.close()


async def test_conversations_beyond_the_waiting_limit_are_refused():
    template = ChatTemplate(
        {"default": "x"}, special_tokens={}, limits=TemplateLimits(max_waiting=2, max_wall_s=10.0)
    )
    request = GenerateRequest(request_id="r", model="m", messages=(Message(role="user"),))
    await template.wait_ready()
    os.kill(template.pool.workers[0].pid, signal.SIGSTOP)
    waiting = [asyncio.ensure_future(template.render(request)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="2 conversations wait for the chat template, the limit is 2"):
        await template.render(request)
    os.kill(template.pool.workers[0].pid, signal.SIGCONT)
    assert await asyncio.gather(*waiting) == ["x", "x"]
    assert await template.render(request) == "x"
    template.close()
    with pytest.raises(GenerateError):
        await template.render(request)


def test_every_worker_is_started_and_serves():
    pool = make_pool(limits=TemplateLimits(num_workers=2))
    pool.wait_ready()
    pids = {worker.pid for worker in pool.workers}
    assert len(pids) == 2
    assert None not in pids
    assert [pool.render(make_job()) for _ in range(4)] == ["hello"] * 4
    assert pool.num_losses == 0
    pool.close()


def test_the_kernel_ends_a_stuck_worker_even_if_nobody_watches():
    """No orphan burns a core after the server was killed."""
    pool = make_pool()
    (worker,) = pool.workers
    with pytest.raises(WorkerLostError, match="the process ended"):
        worker.render(make_frame(make_job("stuck")), max_wall_s=30.0)
    pool.close()


def test_after_close_nothing_runs_and_renders_fail():
    pool = make_pool()
    pool.wait_ready()
    (worker,) = pool.workers
    pid = worker.pid
    pool.close()
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(GenerateError):
        pool.render(make_job())
