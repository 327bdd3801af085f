"""Logs: one JSON object a line, nothing that a terminal would obey, never anybody's text or key, never a wait."""

import io
import json
import logging
import threading

import pytest

from penstock.core.ports import EngineEvents
from penstock.observe.logs import Fanout, JsonFormatter, LogWriter, RequestLog
from tests.fakes.http_server import USER_KEY, bench
from tests.fakes.model_client import FakeModelClient
from tests.unit.observe.test_metrics import MODEL, RECORD, STEP


@pytest.fixture
def stream():
    return io.StringIO()


@pytest.fixture
def writer(stream):
    found = LogWriter(stream=stream)
    found.start()
    yield found
    found.stop()


def lines(writer: LogWriter, stream: io.StringIO) -> list[dict]:
    writer.stop()
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    writer.start()
    return found


def record(message: str, **extra: object) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": message, "levelname": "INFO", "name": "penstock.x", **extra})


@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\n{}", "\x1b[31mred", "\x00", "\u2028", "\x9b31m", "\x7f", "\udc80", '"}']
)
def test_a_line_is_one_json_object_whatever_is_in_it(text):
    line = JsonFormatter().format(record(text, field=text))
    assert len(line.splitlines()) == 1
    assert not any(ord(character) < 0x20 or 0x7F <= ord(character) <= 0x9F for character in line)
    assert json.loads(line)["level"] == "info"


def test_the_telemetry_record_is_one_line_with_every_field(writer, stream):
    RequestLog().on_request(RECORD)
    (line,) = lines(writer, stream)
    for name in RECORD.__struct_fields__:
        assert name in line
    assert (line["finish_reason"], line["ttft_s"]) == ("stop", 0.2)


def test_steps_and_tokens_are_not_logged(writer, stream):
    log = RequestLog()
    log.on_step(MODEL, STEP)
    log.on_token_gap(MODEL, 0.1)
    log.on_engine_restart(MODEL, "hung")
    (line,) = lines(writer, stream)
    assert (line["level"], line["reason"]) == ("warning", "hung")


def test_exceptions_are_kept_in_the_same_line(writer, stream):
    try:
        int("two\nlines")
    except ValueError:
        logging.getLogger("penstock.server").exception("failed")
    (line,) = lines(writer, stream)
    assert "ValueError: invalid literal" in line["exception"]


class StuckStream(io.StringIO):
    """A log reader that takes nothing until it is let go."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate
        self.told = threading.Event()

    def write(self, text: str) -> int:
        self.gate.wait(10)
        written = super().write(text)
        if "dropped" in text:
            self.told.set()
        return written


def test_a_stuck_reader_costs_lines_and_never_a_wait():
    gate = threading.Event()
    stream = StuckStream(gate)
    writer = LogWriter(stream=stream)
    writer.start()
    logger = logging.getLogger("penstock.flood")
    for _ in range(10_100):
        logger.info("x")
    assert 90 <= writer.num_dropped <= 100
    dropped = writer.num_dropped
    gate.set()
    assert stream.told.wait(10)
    writer.stop()
    told = [json.loads(line) for line in stream.getvalue().splitlines() if "num_dropped" in line]
    assert [line["num_dropped"] for line in told] == [dropped]


def test_a_fanout_hands_every_event_to_every_sink():
    seen = []

    class Sink:
        def __getattr__(self, name):
            return lambda *args: seen.append(name)

    fan: EngineEvents = Fanout(Sink(), Sink())
    fan.on_step(MODEL, STEP)
    fan.on_token_gap(MODEL, 0.1)
    fan.on_request(RECORD)
    fan.on_engine_restart(MODEL, "died")
    fan.on_grammar(MODEL, "compiled", 0.1)
    names = ("on_step", "on_token_gap", "on_request", "on_engine_restart", "on_grammar")
    assert seen == [name for name in names for _ in range(2)]


async def test_no_prompt_no_answer_and_no_key_ever_reaches_the_log(writer, stream):
    logging.getLogger("penstock").setLevel(logging.DEBUG)
    secret, said = "the-secret-prompt", "the-secret-answer"
    for failure in (None, RuntimeError("boom")):
        model = FakeModelClient(pieces=(said,), repeat=3, failure=failure, fail_after=2)
        async with bench(model, keys=True) as b:
            for streaming in (False, True):
                for key in (USER_KEY, "sk-secret-wrong"):
                    await b.http.post(
                        "/v1/chat/completions",
                        json={
                            "messages": [{"role": "user", "content": secret}],
                            "stream": streaming,
                            "user": secret,
                        },
                        headers={"authorization": f"Bearer {key}"},
                    )
            await b.http.get("/generate", params={"prompt": secret})
    lines(writer, stream)
    text = stream.getvalue()
    assert "boom" in text
    for private in (secret, said, USER_KEY, "sk-secret-wrong"):
        assert private not in text
