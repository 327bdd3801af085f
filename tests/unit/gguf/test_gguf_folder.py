"""A GGUF file in the place of a model folder: tokenizer, chat template, ends of answers, and its revision."""

import json
import os
from pathlib import Path

import pytest
import transformers

import penstock
from penstock.cli.model_source import find_model
from penstock.core.errors import CheckpointError, StartupError, UnsupportedModelError
from penstock.text.chat_template import ChatTemplate
from penstock.text.gguf.header import read_header
from penstock.text.gguf.tokenizer import tokenizer_fields
from penstock.text.tokenizer import Tokenizer
from tests.unit.gguf.gguf_bytes import ARRAY, BOOL, F32, STRING, U32, entry, file_bytes, write
from tools.quantized.gguf_file import write_gguf

EMBEDDED = Path(penstock.__file__).parent / "models" / "embedded"
TEXTS = (
    "Hello, w\u00f6rld 12345! It's  a\n\n test",
    "<|im_start|>user\n<tool_call>{}</tool_call><|im_end|>\n",
    "  two spaces, \ttabs and \U0001f600\u4f60\u597d\u00df don't",
    "",
)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tales.gguf"
    write_gguf(EMBEDDED, path, kind="Q4_0", pre="smollm")
    return path


def test_the_embedded_models_tokenizer_comes_back(embedded: Path) -> None:
    ours, original = Tokenizer.from_folder(embedded), Tokenizer.from_folder(EMBEDDED)
    for text in TEXTS:
        ids = original.encode(text, add_special_tokens=True)
        assert ours.encode(text, add_special_tokens=True) == ids
        assert ours.decode(ids) == original.decode(ids)
    assert ours.eos_token_ids == original.eos_token_ids
    assert ours.table.special_ids == original.table.special_ids
    assert ours.special_tokens["bos_token"] == original.special_tokens["bos_token"]


def test_the_chat_template_comes_with_the_file(embedded: Path) -> None:
    ours = ChatTemplate.from_folder(embedded, special_tokens={})
    original = ChatTemplate.from_folder(EMBEDDED, special_tokens={})
    assert ours is not None
    assert original is not None
    assert ours.sources == original.sources
    for each in (ours, original):
        each.close()


def test_a_file_is_a_model_of_its_own_name_and_revision(embedded: Path) -> None:
    source = find_model(str(embedded))
    assert (source.name, source.root, source.path) == ("tales", "tales.gguf", embedded)
    os.utime(embedded, ns=(1, 1))
    assert find_model(str(embedded)).revision != source.revision
    with pytest.raises(StartupError, match="revision is 'main'"):
        find_model(str(embedded), revision="main")


def test_a_damaged_file_or_another_architecture_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.gguf: .*truncated"):
        find_model(str(write(tmp_path, b"GGUF")))
    bert = file_bytes([entry("general.architecture", STRING, "bert")], [])
    with pytest.raises(UnsupportedModelError, match="'bert', which is not supported; known: llama, qwen2"):
        find_model(str(write(tmp_path, bert)))


def test_a_folder_of_gguf_files_points_to_the_file(tmp_path: Path) -> None:
    from penstock.models.checkpoint import open_checkpoint

    write(tmp_path, b"GGUF")
    with pytest.raises(CheckpointError, match=r"model\.gguf is there: give the path of the file itself"):
        open_checkpoint(tmp_path)


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = [
    "\u2581", "a", "b", "c", "e", "h", "l", "o", "\u2581a", "ab", "he", "ll", "lo", "llo", "hello", "\u2581he", "\u2581hello", "bc",
]  # fmt: skip


def sentence_piece(folder: Path, **changes: bytes) -> Path:
    tokens = PIECES + WORDS
    scores = [0.0] * len(PIECES) + [-float(i) for i in range(len(WORDS))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(WORDS)
    entries = {
        "architecture": entry("general.architecture", STRING, "llama"),
        "model": entry("tokenizer.ggml.model", STRING, "llama"),
        "tokens": entry("tokenizer.ggml.tokens", ARRAY, (STRING, tokens)),
        "scores": entry("tokenizer.ggml.scores", ARRAY, (F32, scores)),
        "types": entry("tokenizer.ggml.token_type", ARRAY, (5, kinds)),
        "bos": entry("tokenizer.ggml.bos_token_id", U32, 1),
        "eos": entry("tokenizer.ggml.eos_token_id", U32, 2),
        "unknown": entry("tokenizer.ggml.unknown_token_id", U32, 0),
    }
    return write(folder, file_bytes([each for each in (entries | changes).values() if each], []))


@pytest.mark.parametrize("text", ["hello", "hello abc", " a  b", "z\u00e9\nhello", "abllo he", ""])
def test_sentence_piece_is_cut_as_transformers_cuts_it(text: str, tmp_path: Path) -> None:
    """Merges follow from the scores; bytes stand in for what is in no token; BOS begins the text."""
    from transformers.tokenization_utils_base import generate_merges

    ours = Tokenizer.from_folder(sentence_piece(tmp_path))
    vocabulary = {token: i for i, token in enumerate(PIECES + WORDS)}
    scores = {token: -float(i) for i, token in enumerate(WORDS)} | dict.fromkeys(PIECES, 0.0)
    theirs = transformers.LlamaTokenizer(
        vocab=vocabulary, merges=generate_merges(vocabulary, scores), legacy=False
    )
    ids = ours.encode(text, add_special_tokens=True)
    assert ids[0] == 1
    if not text.startswith(" ") and text:  # the two spell leading spaces differently
        assert ids[1:] == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids[1:]) == text


def test_without_a_space_prefix_the_text_begins_as_it_is(tmp_path: Path) -> None:
    prefix = entry("tokenizer.ggml.add_space_prefix", BOOL, False)
    begin = entry("tokenizer.ggml.add_bos_token", BOOL, False)
    tokenizer = Tokenizer.from_folder(sentence_piece(tmp_path, prefix=prefix, begin=begin))
    ids = tokenizer.encode("hello", add_special_tokens=True)
    assert ids == [(PIECES + WORDS).index("hello")]


REFUSED = {
    "another kind": ({"model": entry("tokenizer.ggml.model", STRING, "t5")}, "'t5', which is not supported; known: gpt2, llama"),
    "no kind": ({"model": b""}, "'tokenizer.ggml.model' is ''"),
    "a pattern": (
        {"model": entry("tokenizer.ggml.model", STRING, "gpt2"), "pre": entry("tokenizer.ggml.pre", STRING, "chatglm")},
        "'chatglm', which is not supported; known: default, gpt-2",
    ),
    "no tokens": ({"tokens": b""}, "'tokenizer.ggml.tokens' is missing"),
    "a token twice": (
        {"tokens": entry("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "a"]))}, "none stands there twice, as 'a' does",
    ),
    "too few scores": ({"scores": entry("tokenizer.ggml.scores", ARRAY, (F32, [1.0]))}, "'tokenizer.ggml.scores'"),
    "too few types": ({"types": entry("tokenizer.ggml.token_type", ARRAY, (5, [1]))}, "'tokenizer.ggml.token_type'"),
    "an id outside": ({"bos": entry("tokenizer.ggml.bos_token_id", U32, 5000)}, "'tokenizer.ggml.bos_token_id' is 5000"),
    "an end at each text": ({"end": entry("tokenizer.ggml.add_eos_token", BOOL, True)}, "add_eos_token"),
    "a merge of three": (
        {
            "model": entry("tokenizer.ggml.model", STRING, "gpt2"),
            "merges": entry("tokenizer.ggml.merges", ARRAY, (STRING, ["a b c"])),
        },
        "pairs with one space between, not 'a b c'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_tokenizer_that_cannot_be_built_is_refused_by_its_key(what: str, tmp_path: Path) -> None:
    changes, message = REFUSED[what]
    path = sentence_piece(tmp_path, **changes)
    with pytest.raises(StartupError) as caught:
        Tokenizer.from_folder(path)
    assert message in caught.value.message


def test_several_templates_keep_their_names(tmp_path: Path) -> None:
    path = sentence_piece(
        tmp_path,
        template=entry("tokenizer.chat_template", STRING, "one"),
        names=entry("tokenizer.chat_templates", ARRAY, (STRING, ["tool_use"])),
        other=entry("tokenizer.chat_template.tool_use", STRING, "two"),
    )
    template = ChatTemplate.from_folder(path, special_tokens={})
    assert template is not None
    assert template.sources == {"default": "one", "tool_use": "two"}
    template.close()
    assert json.dumps(tokenizer_fields(read_header(path).metadata))
