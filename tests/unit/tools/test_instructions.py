"""The instruction generator: a pure function, with what evaluation asks kept out of training."""

import json

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tools.embedded import data, instructions
from tools.embedded.instructions import KINDS, evaluation_set, make_conversation
from tools.embedded.tokenizer import BOS, CHAT_TEMPLATE
from tools.embedded.wordings import WORDINGS


def raise_exception(message: str) -> None:
    """What chat templates call to refuse."""
    raise ValueError(message)


def render(messages: list[dict[str, object]], **options: object) -> str:
    """Render the chat template as a server would."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string(CHAT_TEMPLATE)
    return template.render(messages=messages, bos_token=BOS, **options)


def test_the_same_seed_and_index_give_the_same_conversation() -> None:
    """Nothing but the arguments decides."""
    assert make_conversation(1, 5) == make_conversation(1, 5)
    assert make_conversation(1, 5) != make_conversation(2, 5)


def test_training_never_contains_what_is_held_out() -> None:
    """Neither the wording nor the operands of any training conversation are held out."""
    assert not any(make_conversation(7, index).is_held_out for index in range(3000))


def test_every_evaluation_question_is_held_out() -> None:
    """The fixed evaluation set can be told from training by the split's rule alone."""
    questions = evaluation_set()
    assert len(questions) == 200
    assert all(question.is_held_out for question in questions)


def test_no_evaluation_question_occurs_in_a_long_stretch_of_training() -> None:
    """The rendered last turns are absent from the first 20,000 training conversations."""
    asked = {question.messages[-2]["content"] for question in evaluation_set()}
    stream = (make_conversation(instructions.TRAIN_SEED, index) for index in range(20_000))
    users = (
        message["content"]
        for conversation in stream
        for message in conversation.messages
        if message["role"] == "user"
    )
    calls = {question.messages[-2]["content"] for question in evaluation_set(count=200)}
    assert asked == calls
    assert not asked.intersection(users)


def test_evaluation_gives_each_kind_an_equal_share() -> None:
    """22 or 23 questions of each of the nine kinds."""
    kinds = [question.kind for question in evaluation_set()]
    assert {kinds.count(kind) for kind in KINDS} == {22, 23}


def test_no_wording_is_both_trained_and_held_out() -> None:
    """Groups may share a phrase, but never across the split."""
    trained = {wording for pair in WORDINGS.values() for wording in pair[0]}
    held_out = {wording for pair in WORDINGS.values() for wording in pair[1]}
    assert not trained & held_out


@pytest.mark.parametrize("index", range(60))
def test_rendering_equals_the_chat_template(index: int) -> None:
    """Training text is what a server renders for the same messages."""
    conversation = make_conversation(3, index)
    messages: list[dict[str, object]] = [dict(message) for message in conversation.messages]
    tools = list(conversation.tools) or None
    text = "".join(piece for piece, _ in data.segments(conversation))
    assert render(messages, tools=tools) == text
    prompt = render(messages[:-1], tools=tools, add_generation_prompt=True)
    assert prompt == data.prompt_text(conversation)


def test_structured_tool_calls_render_as_the_model_writes_them() -> None:
    """`tool_calls` of an assistant message become the hermes text."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    text = render([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert instructions.call_text("f", {"a": 1}) in text


def test_an_unknown_role_is_refused() -> None:
    """The template names the role it does not know."""
    with pytest.raises(ValueError, match="unknown role: narrator"):
        render([{"role": "narrator", "content": "Once"}])


def test_sums_are_right() -> None:
    """The expected answers of arithmetic can be checked."""
    for index in range(200):
        *steps, total = make_conversation(5, index, kind="arithmetic").expected.rstrip(".").split(" = ")
        assert {eval(step) for step in steps} == {int(total)}  # our own digits and signs


@pytest.mark.parametrize("kind", instructions.HARD_KINDS)
def test_hard_kinds_keep_to_the_split(kind: str) -> None:
    """They are held out by the same rule, and the evaluation set has none of them."""
    assert not any(make_conversation(7, index, kind=kind).is_held_out for index in range(300))
    assert all(make_conversation(7, index, split="eval", kind=kind).is_held_out for index in range(100))
    assert kind not in {question.kind for question in evaluation_set()}


def test_a_called_tool_is_among_those_offered() -> None:
    """Whatever a conversation of new tools calls, its schema names with the same arguments."""
    for index in range(200):
        asked = make_conversation(7, index, kind="new_tools")
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in asked.tools}
        said = [one["content"] for one in asked.messages if one["role"] == "assistant"]
        calls = [json.loads(text.split("\n")[1]) for text in said if text.startswith("<tool_call>")]
        assert calls
        assert all(schemas[call["name"]]["required"] == list(call["arguments"]) for call in calls)
