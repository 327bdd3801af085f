"""Admission: what can never fit is refused with the numbers."""

import msgspec
import pytest
from policy_rig import request

from penstock.core.errors import InvalidParameterError, QueueFullError
from penstock.core.tokens import EngineInfo, EngineRequest, Pooling
from penstock.engine.scheduler.admission import (
    AdmissionLimits,
    QueueLoad,
    check_admissible,
    check_queue,
    limits_from_info,
    num_blocks_max,
)

LIMITS = AdmissionLimits(max_model_len=32, max_num_seqs=4, num_blocks=8, block_size=4, windows=(None,))


def refusal(limits: AdmissionLimits = LIMITS, **kwargs) -> InvalidParameterError:
    with pytest.raises(InvalidParameterError) as caught:
        check_admissible(request("r", **kwargs), limits=limits)
    return caught.value


def test_what_just_fits_is_admitted():
    check_admissible(request("r", [1] * 28, max_tokens=4), limits=LIMITS)


def test_the_sum_of_prompt_and_answer_is_bounded():
    error = refusal(prompt=[1] * 28, max_tokens=5)
    assert (error.code, error.param) == ("context_length_exceeded", "max_tokens")
    assert all(number in error.message for number in ("28", "5", "33", "32"))


def test_a_prompt_that_fills_the_context_is_named():
    assert refusal(prompt=[1] * 32, max_tokens=1).param == "prompt"


def test_an_empty_prompt_is_refused():
    assert refusal(prompt=[]).param == "prompt"


def test_token_ids_are_checked_against_the_vocabulary():
    limits = msgspec.structs.replace(LIMITS, vocab_size=10)
    assert "10" in refusal(limits, prompt=[10]).message
    assert "-1" in refusal(prompt=[-1]).message
    check_admissible(request("r", [9]), limits=limits)


def test_a_token_id_that_no_key_can_hold_is_refused_without_a_vocabulary_too():
    assert "4294967296" in refusal(prompt=[2**32]).message


def test_parameters_are_checked_at_this_door_as_well():
    assert refusal(prompt=[1], n=0).param == "n"
    assert refusal(prompt=[1], temperature=float("nan")).param == "temperature"


def test_more_answers_than_seats_are_refused():
    assert refusal(prompt=[1], n=5).param == "n"


def test_more_blocks_than_the_pool_are_refused_with_both_numbers():
    error = refusal(prompt=[1] * 8, max_tokens=9, n=4)
    # Two shared blocks, and two more for each answer: the last token is never computed.
    assert "10 KV blocks" in error.message
    assert "the pool has 8" in error.message


def test_the_last_token_needs_no_slot():
    assert num_blocks_max(request("r", [1] * 8, max_tokens=1), limits=LIMITS) == 2
    assert num_blocks_max(request("r", [1] * 8, max_tokens=2), limits=LIMITS) == 3
    assert num_blocks_max(request("r", [1] * 8, max_tokens=0), limits=LIMITS) == 2


def test_max_tokens_must_be_a_number_here():
    assert refusal(prompt=[1], max_tokens=None).param == "max_tokens"


def queue(num_requests: int, num_tokens: int) -> QueueLoad:
    return QueueLoad(num_requests=num_requests, num_tokens=num_tokens, max_num_requests=2, max_num_tokens=100)


def test_a_full_queue_says_when_to_come_again():
    with pytest.raises(QueueFullError, match="max_num_queued_reqs is 2") as caught:
        check_queue(queue(2, 10), num_prompt_tokens=1, retry_after_s=3.0)
    assert caught.value.retry_after_s == 3.0


def test_the_queue_is_bounded_in_tokens_but_an_empty_one_takes_any_prompt():
    with pytest.raises(QueueFullError, match="max_num_queued_tokens is 100"):
        check_queue(queue(1, 90), num_prompt_tokens=11, retry_after_s=1.0)
    check_queue(queue(1, 90), num_prompt_tokens=10, retry_after_s=1.0)
    check_queue(queue(0, 0), num_prompt_tokens=1000, retry_after_s=1.0)


def test_the_api_side_decides_as_the_engine_does():
    info = EngineInfo(
        architecture="x",
        num_parameters=1,
        dtype="float32",
        kernels="reference",
        device="cpu",
        vocab_size=10,
        weights_bytes=1,
        kv_bytes=1,
        bytes_per_block=1,
        block_size=4,
        num_blocks=8,
        num_cache_groups=2,
        cache_group_windows=(None, 6),
        max_model_len=32,
        max_num_seqs=4,
        max_num_batched_tokens=8,
        load_time_s=0.0,
        warmup_time_s=0.0,
    )
    limits = limits_from_info(info)
    assert limits.windows == (None, 6)
    assert limits_from_info(msgspec.structs.replace(info, cache_group_windows=())).windows == (None, None)
    assert "9 KV blocks" in refusal(limits, prompt=[1] * 12, max_tokens=12).message


def pooled(kind: str, *token_ids: int, **params) -> EngineRequest:
    asked = request("r", [1, 2], max_tokens=params.pop("max_tokens", 0), **params)
    return msgspec.structs.replace(asked, pooling=Pooling(kind, token_ids))


@pytest.mark.parametrize(
    ("num_labels", "asked", "word"),
    [
        (0, pooled("classify"), "classes"),
        (0, pooled("logits"), "token ids"),
        (0, pooled("mean", 1), "token ids"),
        (0, pooled("logits", 10), "10"),
        (0, pooled("logits", -1), "-1"),
        (0, pooled("cls"), "mean, last"),
        (0, pooled("mean", max_tokens=1), "max_tokens"),
        (0, pooled("mean", temperature=0.5), "sampling"),
        (2, pooled("logits", 1), "2 classes"),
        (2, request("r", [1]), "cannot generate"),
    ],
)
def test_a_head_gives_scores_of_tokens_or_of_classes_and_nothing_is_drawn(num_labels, asked, word):
    limits = msgspec.structs.replace(LIMITS, vocab_size=10, num_labels=num_labels)
    with pytest.raises(InvalidParameterError, match=word):
        check_admissible(asked, limits=limits)


@pytest.mark.parametrize(("num_labels", "kind"), [(0, "mean"), (0, "last"), (1, "classify"), (1, "mean")])
def test_a_prompt_alone_may_fill_the_context(num_labels, kind):
    limits = msgspec.structs.replace(LIMITS, num_labels=num_labels)
    check_admissible(msgspec.structs.replace(pooled(kind), prompt_token_ids=[1] * 32), limits=limits)
