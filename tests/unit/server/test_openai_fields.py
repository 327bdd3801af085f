"""No field of the official SDK is accepted and ignored: each is honoured, or refused by its name."""

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam

from penstock.server.dialects.openai.chat import ChatRequest
from penstock.server.dialects.openai.completions import CompletionRequest
from penstock.server.dialects.openai.fields import REFUSED, StreamOptions, is_neutral
from tests.fakes.http_server import bench

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
RAW = {"prompt": "hi"}


def sdk_fields(*classes: type) -> set[str]:
    return {name for cls in classes for base in cls.__mro__ for name in getattr(base, "__annotations__", {})}


CHAT_FIELDS = sdk_fields(
    chat_params.CompletionCreateParamsBase,
    chat_params.CompletionCreateParamsNonStreaming,
    chat_params.CompletionCreateParamsStreaming,
)
RAW_FIELDS = sdk_fields(
    completion_params.CompletionCreateParamsBase,
    completion_params.CompletionCreateParamsNonStreaming,
    completion_params.CompletionCreateParamsStreaming,
)


@pytest.mark.parametrize(("model", "fields"), [(ChatRequest, CHAT_FIELDS), (CompletionRequest, RAW_FIELDS)])
def test_every_field_of_the_sdk_is_known(model, fields):
    assert len(fields) > 15
    assert fields - set(model.model_fields) - set(REFUSED) == set()


def test_every_stream_option_of_the_sdk_is_known():
    assert sdk_fields(ChatCompletionStreamOptionsParam) - set(StreamOptions.model_fields) == set()


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_no_field_is_both_honoured_and_refused(model):
    assert set(model.model_fields) & set(REFUSED) == set()


@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.parametrize(("url", "base"), [("/v1/chat/completions", CHAT), ("/v1/completions", RAW)])
async def test_a_refused_field_is_named_and_its_empty_values_pass(name, url, base):
    async with bench() as b:
        refused = await b.http.post(url, json=base | {name: {"ask": ["for", "something"]}})
        for nothing in REFUSED[name]:
            passed = await b.http.post(url, json=base | {name: nothing})
            assert passed.status_code == 200, passed.text
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["code"]) == (400, name, "unsupported_parameter")


def test_neutral_values_are_compared_by_kind_too():
    assert is_neutral(None, allowed=(None, False))
    assert not is_neutral(0, allowed=(None, False))
    assert not is_neutral(True, allowed=(1,))


async def test_labels_change_nothing():
    labels = {
        "user": "u",
        "safety_identifier": "s",
        "metadata": {"a": "b"},
        "prompt_cache_key": "k",
        "store": False,
    }
    async with bench() as b:
        await b.http.post("/v1/completions", json=RAW)
        await b.http.post("/v1/completions", json=RAW | labels)
    first, second = b.model.requests
    assert (first.prompt, first.params, first.cache_salt) == (second.prompt, second.params, second.cache_salt)
