"""Our ids, texts and prompts are those of the Hugging Face stack for the same folder."""

import json
from pathlib import Path

import pytest

from penstock.core.errors import PenstockError
from penstock.core.text import GenerateRequest, Message
from penstock.text.chat_template import ChatTemplate
from penstock.text.tokenizer import Tokenizer
from tests.unit.text import template_samples
from tests.unit.text.tiny_vocabularies import STYLES, write_folder

transformers = pytest.importorskip("transformers")

TEXTS = [
    "hello world, the quick brown fox",
    " leading and trailing ",
    "caf\u00e9 \u4f60\u597d \U0001f600\n\n  x\t1",
    "<|im_start|>user\nhi<|im_end|> <s></s>",
    "a<tool>b <tool> c",
    "\u2581\u2581 odd",
]
CONFIGS = {
    "plain": {"bos_token": "<s>", "eos_token": "</s>"},
    "add_bos_token in the config is left to the post-processor": {"bos_token": "<s>", "add_bos_token": False},
    "special tokens only in the config": {
        "eos_token": "<end>",
        "additional_special_tokens": ["<tool>", "<|im_end|>"],
    },
    "added_tokens_decoder": {
        "eos_token": "</s>",
        "added_tokens_decoder": {
            "2": {"content": "</s>", "special": True, "normalized": False},
            "600": {"content": "<tool>", "special": False, "normalized": True, "rstrip": True},
        },
    },
}


def both(folder: Path):
    return Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)


def assert_same(ours, theirs, texts=TEXTS):
    for text in texts:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                    ids, skip_special_tokens=skip
                )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("style", STYLES)
def test_ids_and_texts_are_those_of_auto_tokenizer(tmp_path, style, config):
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    ours, theirs = both(write_folder(tmp_path, style, tokenizer_config=config))
    assert_same(ours, theirs)
    assert ours.special_tokens == dict(theirs.special_tokens_map)
    assert ours.vocab_size == len(theirs)


def test_a_folder_saved_by_the_stack_loads_the_same(tmp_path):
    _, theirs = both(write_folder(tmp_path / "first", "llama"))
    theirs.save_pretrained(tmp_path / "second")
    ours, again = both(tmp_path / "second")
    assert_same(ours, again)


EMBEDDED = Path(__file__).parents[3] / "penstock" / "models" / "embedded"


has_embedded = pytest.mark.skipif(
    not (EMBEDDED / "tokenizer.json").exists(), reason="the embedded model is not there yet"
)


@has_embedded
def test_the_embedded_models_tokenizer_is_the_same_in_both_stacks():
    ours, theirs = both(EMBEDDED)
    books = [
        "\u201cOh dear!\u201d said Alice\u2014once upon a time.",
        "Chapter I.\n\n  The caf\u00e9",
        "1 + 2 = 3",
    ]
    assert_same(ours, theirs, [*TEXTS, *books])
    generation = json.loads((EMBEDDED / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] in (ours.eos_token_ids[0], list(ours.eos_token_ids))


@has_embedded
async def test_the_embedded_models_prompts_are_the_same_in_both_stacks():
    ours, theirs = both(EMBEDDED)
    template = ChatTemplate.from_folder(EMBEDDED, special_tokens=ours.special_tokens)
    try:
        for messages, tools in template_samples.CONVERSATIONS.values():
            turns = tuple(Message(**m | {"tool_calls": tuple(m.get("tool_calls", ()))}) for m in messages)
            request = GenerateRequest(request_id="r", model="m", messages=turns, tools=tuple(tools))
            prompt = await template.render(request)
            expected = theirs.apply_chat_template(
                messages, tools=tools or None, add_generation_prompt=True, tokenize=False
            )
            assert prompt == expected
            assert ours.encode(prompt, add_special_tokens=False) == theirs.encode(
                prompt, add_special_tokens=False
            )
    except PenstockError as error:
        pytest.fail(f"refused: {error}")
    finally:
        template.close()
