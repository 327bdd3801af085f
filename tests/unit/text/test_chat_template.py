"""Chat templates: found in a folder, rendered as the Hugging Face stack renders them, and what is refused."""

import pytest

from penstock.core.errors import CheckpointError, InvalidParameterError, PenstockError, StartupError
from penstock.core.text import GenerateRequest, Message
from penstock.text.chat_template import ChatTemplate
from penstock.text.template_worker import Renderer, Setup
from tests.unit.text import template_samples
from tests.unit.text.tiny_vocabularies import make_backend, write_folder

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def make_request(messages, tools=(), **fields):
    turns = []
    for message in messages:
        calls = tuple(message.get("tool_calls", ()))
        turns.append(Message(**(message | {"tool_calls": calls})))
    return GenerateRequest(request_id="r", model="m", messages=tuple(turns), tools=tuple(tools), **fields)


def render_here(source, request):
    """The worker's renderer without its process."""
    template = ChatTemplate({"default": source}, special_tokens=NAMES)
    try:
        setup = Setup(
            templates={"default": source},
            special_tokens=NAMES,
            max_output_chars=10**6,
            max_cpu_s=1.0,
            max_memory_bytes=1 << 28,
        )
        return Renderer(setup).render(template._job(request))
    finally:
        template.close()


@pytest.fixture(scope="module")
def stack():
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=make_backend("byte-level"), **NAMES)


def outcome(render):
    """The text, or that it was refused."""
    try:
        return render()
    except Exception:  # noqa: BLE001  # either stack may refuse in its own way
        return "refused"


def test_a_template_can_read_every_field_of_a_message():
    source = (
        "{% for m in messages %}{{ m.role }}|{{ m.name }}|{{ m.content }}|{{ m.tool_call_id }}|"
        "{% for call in m.tool_calls or [] %}{{ call.id }}={{ call.function.name }}{% endfor %};{% endfor %}"
    )
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "user", "content": "hi", "name": "Ann"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]
    prompt = render_here(source, make_request(messages))
    assert prompt == "user|Ann|hi||;assistant||||c1=f;tool||2|c1|;"


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("conversation", template_samples.CONVERSATIONS)
@pytest.mark.parametrize("name", template_samples.ALL)
def test_prompts_are_those_of_apply_chat_template(stack, name, conversation, prompt):
    source = template_samples.ALL[name]
    messages, tools = template_samples.CONVERSATIONS[conversation]
    request = make_request(messages, tools, add_generation_prompt=prompt)
    theirs = outcome(
        lambda: stack.apply_chat_template(
            messages,
            tools=tools or None,
            chat_template=source,
            add_generation_prompt=prompt,
            tokenize=False,
        )
    )
    assert outcome(lambda: render_here(source, request)) == theirs


def test_the_samples_are_mostly_accepted(stack):
    """Guards the comparison above: it would also hold if everything were refused."""
    pairs = [(s, c) for s in template_samples.ALL.values() for c in template_samples.CONVERSATIONS.values()]
    texts = [outcome(lambda s=s, c=c: render_here(s, make_request(*c))) for s, c in pairs]
    assert texts.count("refused") < len(texts) / 3
    assert any("Z\u00fcrich <&>" in text for text in texts)


@pytest.mark.parametrize("content", ["The capital is", " trailing blanks  ", "line\n"])
@pytest.mark.parametrize("name", ["chatml", "headers", "turns"])
def test_a_continued_message_is_cut_as_the_stack_cuts_it(stack, name, content):
    source = template_samples.ALL[name]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    request = make_request(messages, continue_final_message=True, add_generation_prompt=False)
    theirs = stack.apply_chat_template(
        messages, chat_template=source, continue_final_message=True, tokenize=False
    )
    assert render_here(source, request) == theirs


async def refusal(template, request):
    try:
        with pytest.raises(PenstockError) as caught:
            await template.render(request)
    finally:
        template.close()
    return caught.value


HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("source", "messages", "fields"),
    [
        ("{{ raise_exception('secret words') }}", HI, {}),
        ("{{ messages[5].role.x }}", HI, {}),
        ("{{ 1 + messages }}", HI, {}),
        ("{{ ''.__class__.__mro__ }}", HI, {}),
        ("{{ messages.append(1) }}", HI, {}),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", HI, {}),
        (
            "fixed text",
            [{"role": "assistant", "content": "a"}],
            {"continue_final_message": True, "add_generation_prompt": False},
        ),
        (
            template_samples.HERMES,
            [{"role": "assistant", "tool_calls": [template_samples.CALL]}],
            {"continue_final_message": True, "add_generation_prompt": False},
        ),
    ],
)
async def test_what_a_template_refuses_is_the_requests_fault_in_fixed_words(source, messages, fields):
    template = ChatTemplate({"default": source}, special_tokens=NAMES)
    error = await refusal(template, make_request(messages, **fields))
    assert isinstance(error, InvalidParameterError)
    assert (error.code, error.param) == ("template_error", "messages")
    assert error.message == "messages do not fit the model's chat template"


@pytest.mark.parametrize(
    ("request_fields", "words"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": HI, "continue_final_message": True}, "only one of them may be"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
        ({"messages": HI, "tools": [{"n": 2**70}]}, "beyond 64 bits"),
    ],
)
async def test_what_cannot_be_rendered_is_refused_by_name(request_fields, words):
    template = ChatTemplate({"default": "{{ messages }}"}, special_tokens=NAMES)
    error = await refusal(template, make_request(**request_fields))
    assert isinstance(error, InvalidParameterError)
    assert words in error.message


async def test_tool_use_is_chosen_for_conversations_with_tools():
    sources = {"default": "plain", "tool_use": "with {{ tools | length }}"}
    template = ChatTemplate(sources, special_tokens={})
    try:
        assert await template.render(make_request(HI)) == "plain"
        assert await template.render(make_request(HI, [template_samples.TOOL])) == "with 1"
    finally:
        template.close()


def sources_of(folder, **options):
    template = ChatTemplate.from_folder(folder, special_tokens={}, **options)
    if template is None:
        return None
    template.close()
    return template.sources


def test_the_folders_files_are_read_in_their_order(tmp_path):
    write_folder(tmp_path, tokenizer_config={})
    assert sources_of(tmp_path) is None
    (tmp_path / "chat_template.json").write_text('{"chat_template": "from json"}', encoding="utf-8")
    assert sources_of(tmp_path) == {"default": "from json"}
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    write_folder(tmp_path, tokenizer_config={"chat_template": named})
    assert sources_of(tmp_path) == {"default": "d", "tool_use": "t"}
    write_folder(tmp_path, tokenizer_config={"chat_template": "one"})
    assert sources_of(tmp_path) == {"default": "one"}
    (tmp_path / "chat_template.jinja").write_text("from file", encoding="utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more", encoding="utf-8")
    assert sources_of(tmp_path) == {"default": "from file", "tool_use": "more"}
    (tmp_path / "own.jinja").write_text("operator's", encoding="utf-8")
    assert sources_of(tmp_path, override=tmp_path / "own.jinja") == {"default": "operator's"}


@pytest.mark.parametrize(
    "value", [5, {"a": 1}, [{"name": "default"}], [{"name": "x", "template": "y"}], ["text"]]
)
def test_a_malformed_template_entry_is_refused(tmp_path, value):
    write_folder(tmp_path, tokenizer_config={"chat_template": value})
    with pytest.raises(CheckpointError, match="chat_template"):
        ChatTemplate.from_folder(tmp_path, special_tokens={})


def test_a_missing_or_broken_operators_file_is_refused(tmp_path):
    with pytest.raises(StartupError, match=r"chat_template is '.*own\.jinja': no such file") as caught:
        ChatTemplate.from_folder(tmp_path, special_tokens={}, override=tmp_path / "own.jinja")
    assert caught.value.exit_code == 2
    (tmp_path / "own.jinja").write_bytes(b"\xff")
    with pytest.raises(StartupError, match=r"own\.jinja is not UTF-8"):
        ChatTemplate.from_folder(tmp_path, special_tokens={}, override=tmp_path / "own.jinja")
