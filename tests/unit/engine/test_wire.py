"""Messages survive the trip between processes, errors keep their class and fields."""

import msgspec
import pytest

from penstock.core.error_info import error_to_info, info_to_error
from penstock.core.errors import EngineError, InvalidParameterError, QueueFullError
from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.text import FinishReason, TokenLogprob, TokenLogprobs
from penstock.core.tokens import EngineRequest, ErrorInfo, RequestStats, TokenDelta
from penstock.engine.wire import (
    Abort,
    Accepted,
    Output,
    Refused,
    Submit,
    decode_from_engine,
    decode_to_engine,
    encode,
)


def test_a_request_survives_the_trip_to_the_engine() -> None:
    params = SamplingParams(n=2, temperature=0.5, logit_bias={7: -1.5}, stop=("a",), max_tokens=3, seed=-1)
    request = EngineRequest(
        request_id=RequestId("r"), prompt_token_ids=[1, 2], params=params, eos_token_ids=(9,)
    )
    assert decode_to_engine(encode(Submit(request))) == Submit(request)


def test_deltas_survive_the_trip_from_the_engine() -> None:
    stats = RequestStats(2, 0, 1, 0.5, 4, 0.25, 0)
    logprobs = (TokenLogprobs(TokenLogprob(3, -0.5, 1), (TokenLogprob(3, -0.5, 1),)),)
    delta = TokenDelta(RequestId("r"), 0, (3,), logprobs, FinishReason.LENGTH, None, 0, stats)
    assert decode_from_engine(encode(Output([delta]))) == Output([delta])


def test_a_message_outside_the_union_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_to_engine(encode(Accepted(RequestId("r"))))
    with pytest.raises(msgspec.ValidationError):
        decode_from_engine(encode(Abort(RequestId("r"))))


def test_an_error_keeps_class_code_param_and_retry() -> None:
    error = QueueFullError("full", param="prompt", retry_after_s=2.5)
    back = info_to_error(error_to_info(error))
    assert type(back) is QueueFullError
    assert (back.message, back.code, back.param, back.retry_after_s) == ("full", "queue_full", "prompt", 2.5)
    refused = Refused(RequestId("r"), error_to_info(InvalidParameterError("bad", param="n")))
    assert decode_from_engine(encode(refused)) == refused


@pytest.mark.parametrize("kind", ["NoSuchError", "ClassVar", "__doc__"])
def test_an_unknown_kind_is_an_engine_error_never_some_other_object(kind: str) -> None:
    assert type(info_to_error(ErrorInfo(kind, "m", "c"))) is EngineError
