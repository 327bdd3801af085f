"""The pool: requests come back compiled or refused, late ones in time, equal ones together, aborted ones never."""

import threading

import pytest
from grammar_rig import VOCAB_SIZE, compiler, request, spec

from penstock.core.errors import GenerateError, InvalidParameterError, QueueFullError
from penstock.engine.grammar import compile_pool
from penstock.engine.grammar.compile_pool import CompilePool
from penstock.engine.grammar.matcher import Matcher


class GatedCompiler:
    """Compiles when the gate is open; counts."""

    def __init__(self, *, error=None):
        self.gate = threading.Event()
        self.compiled = []
        self.error = error

    def warm_up(self):
        pass

    def cached(self, _):
        return None

    def compile(self, grammar):
        self.gate.wait(10)
        self.compiled.append(grammar)
        if self.error:
            raise self.error
        return compiler().compile(grammar)


class Rung:
    """A pool whose wake can be waited for."""

    def __init__(self, source, **kwargs):
        self.pool = CompilePool(source, vocab_size=VOCAB_SIZE, **kwargs)
        self.bell = threading.Semaphore(0)
        self.pool.wake = self.bell.release

    def next_done(self):
        assert self.bell.acquire(timeout=10)
        return self.pool.take_done()


@pytest.fixture
def gated():
    source = GatedCompiler()
    yield source
    source.gate.set()


def test_the_vocabulary_is_read_once_however_often_that_is_asked_for():
    reads = []
    source = GatedCompiler()
    source.warm_up = lambda: reads.append(1)
    rung = Rung(source)
    for _ in range(3):
        rung.pool.warm_up()
    rung.pool._threads.shutdown(wait=True)
    assert reads == [1]


def test_a_request_comes_back_with_a_matcher_of_its_own():
    rung = Rung(compiler())
    rung.pool.submit(request(spec("regex", "compiled in a pool")))
    (done,) = rung.next_done()
    assert isinstance(done.outcome, Matcher)
    assert done.compile_s > 0
    assert rung.pool.take_done() == []
    rung.pool.close()


def test_a_cached_grammar_is_done_at_once():
    rung = Rung(compiler())
    rung.pool.compile_now(request(spec("regex", "known before")))
    rung.pool.submit(request(spec("regex", "known before")))
    (done,) = rung.pool.take_done()
    assert done.compile_s == 0
    assert isinstance(done.outcome, Matcher)


def test_a_bad_grammar_comes_back_refused_also_the_second_time():
    rung = Rung(compiler())
    for _ in range(2):
        rung.pool.submit(request(spec("regex", "bad (")))
        (done,) = rung.next_done()
        assert isinstance(done.outcome, InvalidParameterError)
    rung.pool.close()


def test_a_grammar_that_takes_too_long_is_refused_while_the_thread_still_works(gated):
    rung = Rung(gated, wall_max_s=0.01)
    rung.pool.submit(request(spec("regex", "late")))
    (done,) = rung.next_done()
    assert "or 0.01 s, to compile" in done.outcome.message
    assert gated.compiled == []
    gated.gate.set()
    rung.pool.close()


def test_a_grammar_that_uses_its_cpu_time_is_refused_and_one_that_waits_for_a_core_is_not():
    class Busy(GatedCompiler):
        def compile(self, grammar):
            if grammar.source == "busy":
                while not self.gate.is_set():
                    pass
            return super().compile(grammar)

    source = Busy()
    rung = Rung(source, cpu_max_s=0.02, wall_max_s=60)
    rung.pool.submit(request(spec("regex", "idle"), name="idle"))
    rung.pool.submit(request(spec("regex", "busy"), name="busy"))
    (done,) = rung.next_done()
    assert (done.request.request_id, "CPU time" in done.outcome.message) == ("busy", True)
    source.gate.set()
    (done,) = rung.next_done()
    assert isinstance(done.outcome, Matcher)
    rung.pool.close()


def test_equal_grammars_wait_for_one_compilation(gated):
    rung = Rung(gated)
    for name in ("a", "b"):
        rung.pool.submit(request(spec("regex", "twins"), name=name))
    gated.gate.set()
    assert [done.request.request_id for done in rung.next_done()] == ["a", "b"]
    assert len(gated.compiled) == 1
    rung.pool.close()


def test_an_aborted_request_does_not_come_back(gated):
    rung = Rung(gated)
    for name in ("a", "b"):
        rung.pool.submit(request(spec("regex", "twins"), name=name))
    rung.pool.abort("a")
    rung.pool.abort("unknown")
    gated.gate.set()
    assert [done.request.request_id for done in rung.next_done()] == ["b"]
    rung.pool.close()


def test_a_request_aborted_when_it_is_done_does_not_come_back():
    rung = Rung(compiler())
    rung.pool.submit(request(spec("regex", "done and gone"), name="a"))
    assert rung.bell.acquire(timeout=10)
    rung.pool.abort("a")
    assert rung.pool.take_done() == []
    rung.pool.close()


def test_a_request_aborted_while_it_is_handed_over_does_not_come_back(monkeypatch):
    """Else the engine would generate for nobody until `max_tokens`."""
    rung = Rung(compiler())

    def start_while_one_leaves(*args, **kwargs):
        rung.pool.abort("a")
        return start_matcher(*args, **kwargs)

    start_matcher = compile_pool.start_matcher
    monkeypatch.setattr(compile_pool, "start_matcher", start_while_one_leaves)
    for name in ("a", "b"):
        rung.pool.submit(request(spec("regex", "handed over"), name=name))
    assert [done.request.request_id for done in rung.next_done()] == ["b"]
    assert rung.pool._ending == []
    rung.pool.close()


def test_too_many_waiting_are_told_to_come_again(gated, monkeypatch):
    monkeypatch.setattr(compile_pool, "MAX_PENDING", 1)
    rung = Rung(gated)
    rung.pool.submit(request(spec("regex", "one"), name="a"))
    with pytest.raises(QueueFullError, match="limit is 1") as caught:
        rung.pool.submit(request(spec("regex", "two"), name="b"))
    assert caught.value.retry_after_s
    gated.gate.set()
    rung.next_done()
    rung.pool.close()


def test_a_fault_of_the_compiler_fails_the_request_alone():
    source = GatedCompiler(error=RuntimeError("boom"))
    source.gate.set()
    rung = Rung(source)
    rung.pool.submit(request(spec("regex", "x")))
    (done,) = rung.next_done()
    assert isinstance(done.outcome, GenerateError)
    rung.pool.close()


@pytest.mark.parametrize(("limit_s", "times"), [(-1.0, 1), (60.0, 0)])
def test_what_a_large_compilation_leaves_over_is_given_back(monkeypatch, limit_s, times):
    given = threading.Semaphore(0)
    monkeypatch.setattr(compile_pool, "LARGE_CPU_S", limit_s)
    monkeypatch.setattr(compile_pool, "return_free_memory", given.release)
    rung = Rung(compiler())
    for source in (f"large ({times}", f"large {times}"):
        rung.pool.submit(request(spec("regex", source)))
        rung.next_done()
    rung.pool._threads.shutdown()
    assert [given.acquire(blocking=False) for _ in range(3)] == [True] * 2 * times + [False] * (3 - 2 * times)
