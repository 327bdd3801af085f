"""A trace file: what it says is what is sent; a bad line is named by its number."""

from pathlib import Path

import pytest

from penstock.bench import trace as trace_module
from penstock.bench.prompts import TokenIdWriter
from penstock.bench.recipe import Recipe, make_workload
from penstock.bench.trace import TraceError, read_trace


def _file(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def _line(timestamp: float, *, input_length: int = 5, output_length: int = 2, more: str = "") -> str:
    return f'{{"timestamp": {timestamp}, "input_length": {input_length}, "output_length": {output_length}{more}}}'


def test_times_are_milliseconds_after_the_first_line(tmp_path: Path) -> None:
    found = read_trace(_file(tmp_path, _line(1000), "", _line(1500), _line(4000)))
    assert [request.arrival_s for request in found] == pytest.approx([0, 0.5, 3.0])


def test_unit_and_speed_scale_the_times(tmp_path: Path) -> None:
    found = read_trace(_file(tmp_path, _line(1), _line(3)), unit="s", speed=4)
    assert [request.arrival_s for request in found] == pytest.approx([0, 0.5])


def test_fewer_lines_are_read_if_fewer_are_wanted(tmp_path: Path) -> None:
    path = _file(tmp_path, _line(0), _line(1), "not json")
    assert len(read_trace(path, num_requests=2)) == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: "),
        ('{"timestamp": 3}', "line 2: .*input_length"),
        (_line(3, more=', "colour": 1'), "line 2: .*colour"),
        (_line(3, input_length=0), "line 2: .*>= 1.*input_length"),
        (_line(3, output_length=1 << 21), "line 2: .*1048576"),
        (_line(-1), "line 2: .*timestamp"),
        (_line(3, more=', "hash_ids": [1, 2]'), "line 2: 2 hash_ids, 5 tokens have 1 blocks of 512"),
        ('{"timestamp": "x", "input_length": 1, "output_length": 1}', "line 2: "),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(TraceError, match=words):
        read_trace(_file(tmp_path, _line(2), line))


def test_times_that_go_back_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="line 3: timestamp goes back"):
        read_trace(_file(tmp_path, _line(2), _line(5), _line(4)))
    with pytest.raises(TraceError, match="line 2: timestamp goes back"):
        read_trace(_file(tmp_path, _line(2), _line(1)))


def test_no_file_and_no_lines_are_told(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "nothing")
    with pytest.raises(TraceError, match="has no lines"):
        read_trace(_file(tmp_path, "", ""))


def test_a_file_beyond_the_limit_is_refused_unless_a_part_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "MAX_REQUESTS", 2)
    path = _file(tmp_path, _line(0), _line(1), _line(2))
    with pytest.raises(TraceError, match="line 3: over 2 requests, choose how many with --num-prompts"):
        read_trace(path)
    assert len(read_trace(path, num_requests=2)) == 2


def test_blocks_of_the_trace_are_shared_in_the_prompts(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        _line(0, input_length=1100, more=', "hash_ids": [7, 8, 9]'),
        _line(1, input_length=1030, more=', "hash_ids": [7, 8, 4]'),
        _line(2, input_length=600),
    )
    workload = make_workload(Recipe(trace=read_trace(path)), writer=TokenIdWriter(seed=0))
    first, second, third = (request.prompt for request in workload.requests)
    assert [len(prompt) for prompt in (first, second, third)] == [1100, 1030, 600]
    assert first[:1024] == second[:1024]
    assert first[1024:1030] != second[1024:1030]
    assert third[:512] != first[:512]
    assert workload.is_open_loop
