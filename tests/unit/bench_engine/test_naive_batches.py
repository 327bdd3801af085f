"""The lowest rungs: what a static batch holds, wastes and streams, with a model that counts."""

import queue
import threading

import pytest
import torch

from penstock.bench.ladder import naive_server
from penstock.bench.ladder.naive_server import Batcher, BatchStream, Job, Totals, load_model
from penstock.core.errors import StartupError


class CountingModel:
    """Calls its streamer as transformers' `generate` does."""

    def __init__(self):
        self.batches = []

    def generate(self, tokens, *, attention_mask, max_new_tokens, streamer, **_):
        self.batches.append((tokens.tolist(), attention_mask.tolist(), max_new_tokens))
        streamer.put(tokens)
        for step in range(max_new_tokens):
            streamer.put(torch.full((len(tokens),), step))
        streamer.end()


def job(prompt: list[int], max_tokens: int) -> tuple[Job, list[int | None]]:
    sent: list[int | None] = []
    return Job(prompt, max_tokens, sent.append), sent


def test_a_batch_is_padded_on_the_left_and_each_answer_ends_at_its_own_length():
    model = CountingModel()
    batcher = Batcher(model=model, batch_size=2, batch_timeout_s=0.0)
    (short, short_sent), (long, long_sent) = job([5], 1), job([6, 7, 8], 3)
    batcher.generate([short, long])
    assert model.batches == [([[0, 0, 5], [6, 7, 8]], [[0, 0, 1], [1, 1, 1]], 3)]
    assert short_sent == [0, None]
    assert long_sent == [0, 1, 2, None]
    assert (batcher.totals.num_prompt_tokens, batcher.totals.num_generated_tokens) == (4, 4)


def test_padding_and_ended_answers_are_owned_and_not_used():
    totals = Totals()
    jobs = [job([1, 2, 3], 4)[0], job([1, 2, 3, 4, 5], 1)[0]]
    stream = BatchStream(jobs, totals)
    stream.put(torch.tensor([[0] * 5, [0] * 5]))
    for step in range(4):
        stream.put(torch.tensor([step, step]))
    stream.end()
    assert 0 < totals.slots_used_s < totals.slots_owned_s


def test_a_batch_takes_what_waits_and_no_more_than_its_size():
    batcher = Batcher(model=None, batch_size=3, batch_timeout_s=0.0)
    for number in range(4):
        batcher.waiting.put(job([number], 1)[0])
    assert [each.prompt for each in batcher.take()] == [[0], [1], [2]]
    assert [each.prompt for each in batcher.take()] == [[3]]


def test_an_unfull_batch_waits_for_one_that_comes_in_time():
    batcher = Batcher(model=None, batch_size=2, batch_timeout_s=30.0, waiting=queue.Queue())
    batcher.waiting.put(job([0], 1)[0])
    taken = []
    thread = threading.Thread(target=lambda: taken.extend(batcher.take()))
    thread.start()
    batcher.waiting.put(job([1], 1)[0])
    thread.join(20)
    assert [each.prompt for each in taken] == [[0], [1]]


def test_without_transformers_a_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(naive_server, "import_module", missing)
    with pytest.raises(StartupError, match=r"penstock\[bench\]"):
        load_model(tmp_path, dtype="bfloat16")
    assert naive_server.main([str(tmp_path), "--port", "1"]) != 0
    assert "need transformers" in capsys.readouterr().err
