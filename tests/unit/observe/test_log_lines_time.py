"""Times in the log say their zone."""

import json
import logging

from penstock.observe.logs import JsonFormatter


def test_times_are_utc_and_say_so() -> None:
    record = logging.makeLogRecord({"msg": "x", "created": 0.0})
    assert json.loads(JsonFormatter().format(record))["time"] == "1970-01-01T00:00:00Z"
