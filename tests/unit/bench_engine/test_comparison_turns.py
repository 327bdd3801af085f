"""Turns, drop-outs and what is kept, with contenders that answer at once."""

import json
import signal

import pytest

from penstock.bench.client import Failure, RequestRecord
from penstock.bench.compare.comparison import Comparison, Course, Standing
from penstock.bench.compare.figures import Observation
from penstock.bench.compare.report import make_record, print_tables, write_record
from penstock.bench.compare.scenarios import Draw
from penstock.bench.target import TargetError
from penstock.core.errors import StartupError


@pytest.fixture(autouse=True)
def own_sigterm():
    """A comparison listens to SIGTERM; the tests' process gets its own handler back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


class Fake:
    """Answers every request in a tenth of a second; can refuse to start, or die at a scenario."""

    def __init__(self, name, log, *, start_error=None, dies_at=None):
        self.name, self._log = name, log
        self._start_error, self._dies_at = start_error, dies_at
        self.facts = {"version": "1"}
        self.is_up = False

    def start(self):
        if self._start_error:
            raise TargetError(self._start_error)
        self.is_up = True
        return 1.5

    def ask(self, scenario):
        self._log.append((self.name, scenario.name))
        if scenario.name == self._dies_at:
            raise TargetError("it died")
        records = []
        for index, request in enumerate(scenario.load.requests):
            made = RequestRecord(
                index=index, num_output_tokens_asked=request.num_output_tokens, start_s=0.0,
                num_prompt_tokens=request.num_prompt_tokens, num_output_tokens=request.num_output_tokens,
            )  # fmt: skip
            made.pieces_s.extend([0.1, 0.2])
            made.last_s = 0.2
            records.append(made)
        return Observation(records=tuple(records), duration_s=0.2)

    def memory_bytes(self):
        return 3 << 20

    def stop(self):
        self.is_up = False


def compare(contenders, *, names=("mixed",), rounds=2, find_bound=None):
    lines, kept = [], []
    standings = [Standing(name=c.name, precision="bf16", contender=c) for c in contenders]
    course = Course(scenario_names=names, rounds=rounds, draw=Draw(vocab_size=5000, scale=0.05))
    whole = Comparison(
        standings,
        course=course,
        tell=lines.append,
        keep=lambda s: kept.append(list(s)),
        find_bound=find_bound,
    ).run()
    return standings, course, whole, lines, kept


def test_the_order_turns_from_round_to_round():
    log = []
    compare([Fake("penstock", log), Fake("vllm", log)])
    assert [name for name, scenario in log if scenario == "mixed"] == ["penstock", "vllm", "vllm", "penstock"]


def test_the_bound_is_found_anew_before_every_scenario_but_one_with_a_late_prompt():
    bounds = iter([0.1, 0.15])
    standings, *_ = compare(
        [Fake("penstock", [])],
        names=("mixed", "long"),
        rounds=2,
        find_bound=lambda load, precision: next(bounds),
    )
    shares = [found["of_bound"] for found in standings[0].rounds["mixed"]]
    assert shares == pytest.approx([0.5, 0.75])
    assert "of_bound" not in standings[0].rounds["long"][0]


def test_servers_get_room_for_what_warms_them_up_too():
    course = Course(scenario_names=("http-1",), rounds=1, draw=Draw(vocab_size=5000))
    assert [scenario.name for scenario in course.scenarios] == ["single", "prefill", "http-1"]
    assert max(scenario.longest for scenario in course.scenarios) == 516


def test_one_whose_first_requests_fail_is_out_with_the_reason():
    class Failing(Fake):
        def ask(self, scenario):
            seen = super().ask(scenario)
            for record in seen.records:
                record.failure = Failure(kind="http_400", message="too long")
            return seen

    standings, _, whole, _, _ = compare([Fake("penstock", []), Failing("vllm", [])])
    assert not whole
    assert standings[1].error == "the first requests failed: http_400: too long"


def test_one_that_cannot_start_is_told_and_the_rest_goes_on():
    log = []
    dead = Fake("vllm", log, start_error="no such file")
    standings, _, whole, lines, _ = compare([Fake("penstock", log), dead])
    assert not whole
    assert "vllm bf16 is out: no such file" in lines
    assert (len(standings[0].rounds["mixed"]), standings[1].error) == (2, "no such file")


def test_one_that_dies_keeps_what_it_had_and_is_stopped():
    log = []
    dies = Fake("vllm", log, dies_at="shared")
    standings, _, _, _, kept = compare([Fake("penstock", log), dies], names=("mixed", "shared"))
    assert len(standings[1].rounds["mixed"]) == 1
    assert standings[1].error == "it died"
    assert not dies.is_up
    assert len(standings[0].rounds["shared"]) == 2
    assert len(kept) > 3, "the record is given out after every scenario"


def test_all_are_stopped_when_the_run_is_interrupted():
    log = []
    fake = Fake("penstock", log)
    fake.ask = lambda _scenario: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        compare([fake])
    assert not fake.is_up


def test_the_record_is_whole_json_with_machine_and_seed(tmp_path, capsys):
    from rich.console import Console

    log = []
    standings, course, _, _, _ = compare([Fake("penstock", log), Fake("vllm", log)])
    path = tmp_path / "deep" / "out.json"
    write_record(make_record(standings, course=course, model="m", command="penstock bench"), path)
    record = json.loads(path.read_text())
    assert record["environment"]["cores"] >= 1
    assert (record["seed"], record["contenders"][1]["name"]) == (0, "vllm")
    assert {row["figure"] for row in record["ratios"]} >= {"output_tokens_per_s", "start_s", "memory_mib"}
    print_tables(Console(width=200), standings, course=course)
    assert "how many times better ours is" in capsys.readouterr().out


def test_a_record_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="output"):
        write_record({}, tmp_path / "file" / "out.json")
