"""Compiles grammars in threads beside the step loop.

llguidance releases the GIL while it compiles, so that a step is not held up; fuel and a time limit bound each
compilation. The loop submits requests and takes back what is done; it never waits.

```
submit --> cached? --------------------------------> done --> take_done
             |  no                                    ^
             +--> a thread compiles (once for equal grammars), or the time is over
```
"""

import logging
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from penstock.core.errors import GenerateError, PenstockError, QueueFullError
from penstock.core.grammar import GrammarSpec
from penstock.core.ids import RequestId
from penstock.core.tokens import EngineRequest
from penstock.engine.grammar.compiled import Compiled
from penstock.engine.grammar.compiler import GrammarCompiler, refusal
from penstock.engine.grammar.matcher import Matcher, start_matcher
from penstock.observe.memory import return_free_memory

NUM_THREADS: Final = 2
MAX_PENDING: Final = 256
"""Requests whose grammars are being compiled; beyond it 429."""
CPU_MAX_S: Final = 0.12
"""A grammar that takes more CPU time is refused; if it compiles later, a second attempt finds it cached."""
WALL_MAX_S: Final = 2.0
"""As `CPU_MAX_S` by the clock, for a machine whose cores have no time for the thread."""
LOOK_AGAIN_S: Final = 0.02
LARGE_CPU_S: Final = 0.05
"""A compilation that took more CPU time, or the vocabulary's first reading, has had tens of megabytes;
what it left over is given back."""
RETRY_AFTER_S: Final = 1.0

log = logging.getLogger("penstock.engine.grammar")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledRequest:
    """A request whose grammar is compiled, or refused."""

    request: EngineRequest
    outcome: Matcher | PenstockError
    compile_s: float
    """0 if it was in the cache."""

    @property
    def outcome_word(self) -> str:
        """`compiled`, `cached` or `refused`."""
        if isinstance(self.outcome, PenstockError):
            return "refused"
        return "compiled" if self.compile_s else "cached"


@dataclass(slots=True, eq=False, kw_only=True)
class _Job:
    """One grammar under way and the requests that wait for it."""

    spec: GrammarSpec
    waiting: list[EngineRequest] = field(default_factory=list)
    began_s: float = 0.0

    def drop(self, request_id: RequestId) -> int:
        """Forget a request; returns how many there were, 0 or 1."""
        kept = [request for request in self.waiting if request.request_id != request_id]
        num_dropped = len(self.waiting) - len(kept)
        self.waiting = kept
        return num_dropped


class CompilePool:
    """See the module. `wake` and the threads aside, one step loop owns it."""

    def __init__(
        self,
        compiler: GrammarCompiler,
        *,
        vocab_size: int,
        cpu_max_s: float = CPU_MAX_S,
        wall_max_s: float = WALL_MAX_S,
    ) -> None:
        """Start no thread yet.

        Args:
            compiler: shared by the threads.
            vocab_size: of the model.
            cpu_max_s: CPU time after which a compilation is refused.
            wall_max_s: time by the clock after which it is.
        """
        self.compiler = compiler
        self._vocab_size = vocab_size
        self._cpu_max_s = cpu_max_s
        self._wall_max_s = wall_max_s
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="penstock-grammar")
        self._has_warmed_up = False
        self._lock = threading.Lock()
        self._jobs: dict[GrammarSpec, _Job] = {}
        self._ending: list[_Job] = []
        """Those whose outcome is known and whose requests are on their way to `take_done`."""
        self._num_waiting = 0
        self._done: list[CompiledRequest] = []
        self.wake: Callable[[], None] = _nobody_waits
        """Called from a thread when something is done; must return at once."""

    def warm_up(self) -> None:
        """Read the vocabulary, in a thread and once, so that the first grammar need not wait for it.

        For a moment in which nobody waits: 1.5 s for 150,000 tokens, much of it with the GIL held.
        """
        if not self._has_warmed_up:
            self._has_warmed_up = True
            self._threads.submit(self._warm_up)

    def _warm_up(self) -> None:
        self.compiler.warm_up()
        return_free_memory()

    def compile_now(self, request: EngineRequest) -> Matcher:
        """Compile in the caller's thread, for callers without a loop.

        Raises:
            InvalidParameterError: the grammar cannot be enforced.
        """
        assert request.grammar is not None, "the request has a grammar"
        spec = request.grammar
        compiled = self.compiler.cached(spec) or self.compiler.compile(spec)
        return start_matcher(compiled, request, vocab_size=self._vocab_size)

    def submit(self, request: EngineRequest) -> None:
        """Let the request's grammar be compiled; it will be in `take_done`, whatever comes of it.

        Raises:
            QueueFullError: `MAX_PENDING` requests wait.
        """
        assert request.grammar is not None, "the request has a grammar"
        try:
            compiled = self.compiler.cached(request.grammar)
        except PenstockError as error:
            self._finish(_Job(spec=request.grammar, waiting=[request]), error, compile_s=0.0)
            return
        if compiled is not None:
            self._finish(_Job(spec=request.grammar, waiting=[request]), compiled, compile_s=0.0)
        else:
            self._enqueue(request, request.grammar)

    def abort(self, request_id: RequestId) -> None:
        """Forget a request that is not done yet; unknown ids are ignored."""
        with self._lock:
            for job in self._jobs.values():
                self._num_waiting -= job.drop(request_id)
            for job in self._ending:
                job.drop(request_id)
            self._done = [done for done in self._done if done.request.request_id != request_id]

    def take_done(self) -> list[CompiledRequest]:
        """What has been compiled or refused since the last call."""
        if not self._done:  # read without the lock: a step pays nothing
            return []
        with self._lock:
            done, self._done = self._done, []
            return done

    def close(self) -> None:
        """Let the threads end; what is under way is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _enqueue(self, request: EngineRequest, spec: GrammarSpec) -> None:
        with self._lock:
            if self._num_waiting >= MAX_PENDING:
                raise QueueFullError(
                    f"{self._num_waiting} requests wait for their grammars, the limit is {MAX_PENDING}",
                    retry_after_s=RETRY_AFTER_S,
                )
            self._num_waiting += 1
            job = self._jobs.get(spec)
            if job is not None:
                job.waiting.append(request)
                return
            job = self._jobs[spec] = _Job(spec=spec, waiting=[request])
        self._threads.submit(self._run, job)

    def _run(self, job: _Job) -> None:
        """In a thread: compile, or be too late."""
        outcome: Compiled | PenstockError
        began_cpu_s = time.thread_time()
        try:
            self.compiler.warm_up()
            job.began_s = time.monotonic()
            self._look_later(job, _own_cpu_time(), after_s=min(self._cpu_max_s, self._wall_max_s))
            outcome = self.compiler.compile(job.spec)
        except PenstockError as error:
            outcome = error
        except Exception:
            log.exception("a grammar could not be compiled")
            outcome = GenerateError("the grammar of this request could not be compiled")
        self._end(job, outcome)
        if time.thread_time() - began_cpu_s > LARGE_CPU_S:
            return_free_memory()

    def _look_later(self, job: _Job, cpu_time_s: Callable[[], float], *, after_s: float) -> None:
        timer = threading.Timer(after_s, self._look, (job, cpu_time_s))
        timer.daemon = True
        timer.start()

    def _look(self, job: _Job, cpu_time_s: Callable[[], float]) -> None:
        """Refuse a grammar that has had its time; look again if its thread had none yet."""
        if self._jobs.get(job.spec) is not job:
            return
        cpu_left_s = self._cpu_max_s - cpu_time_s()
        wall_left_s = self._wall_max_s - (time.monotonic() - job.began_s)
        if cpu_left_s > 0 and wall_left_s > 0:
            self._look_later(job, cpu_time_s, after_s=min(max(cpu_left_s, LOOK_AGAIN_S), wall_left_s))
            return
        late = f"it takes more than {self._cpu_max_s:g} s of CPU time, or {self._wall_max_s:g} s, to compile"
        self._end(job, refusal(job.spec, late))

    def _end(self, job: _Job, outcome: Compiled | PenstockError) -> None:
        with self._lock:
            if self._jobs.get(job.spec) is not job:
                return  # ended before, late or in time
            del self._jobs[job.spec]
            self._num_waiting -= len(job.waiting)
            self._ending.append(job)
        self._finish(job, outcome, compile_s=time.monotonic() - job.began_s)

    def _finish(self, job: _Job, outcome: Compiled | PenstockError, *, compile_s: float) -> None:
        """Hand over those that wait for the job; who is aborted meanwhile is not among them."""
        done = [
            CompiledRequest(
                request=request,
                outcome=start_matcher(outcome, request, vocab_size=self._vocab_size)
                if isinstance(outcome, Compiled)
                else outcome,
                compile_s=compile_s,
            )
            for request in job.waiting
        ]
        with self._lock:
            kept = {request.request_id for request in job.waiting}
            self._done = [*self._done, *(each for each in done if each.request.request_id in kept)]
            self._ending = [other for other in self._ending if other is not job]
        self.wake()


def _own_cpu_time() -> Callable[[], float]:
    """Seconds of CPU time that the calling thread will have used since, for whoever asks."""
    if sys.platform != "linux":
        began_s = time.monotonic()
        return lambda: time.monotonic() - began_s
    clock = time.pthread_getcpuclockid(threading.get_ident())
    used_s = time.clock_gettime(clock)
    return lambda: time.clock_gettime(clock) - used_s


def _nobody_waits() -> None:
    """`wake` of a pool whose owner asks by itself."""
