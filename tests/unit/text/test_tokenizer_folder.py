"""Loading a tokenizer from a model folder: what is read, and how a broken folder is refused."""

import json

import pytest

from penstock.core.errors import CheckpointError, InvalidParameterError
from penstock.text.detokenizer import Detokenizer
from penstock.text.tokenizer import Tokenizer
from tests.unit.text.tiny_vocabularies import STYLES, make_backend, make_tokenizer, write_folder

NO_EOS = {"tokenizer_config": {}}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": 7}, **NO_EOS}, (7,)),
        ({"generation_config": {"eos_token_id": [7, 4, 7]}, **NO_EOS}, (7, 4)),
        ({"generation_config": {"eos_token_id": 7}, "config": {"eos_token_id": 8}, **NO_EOS}, (7,)),
        ({"generation_config": {}, "config": {"eos_token_id": [8, 9]}, **NO_EOS}, (8, 9)),
        ({"config": {"eos_token_id": 8}}, (8, 2)),
        ({"config": {"eos_token_id": 2}}, (2,)),
        (NO_EOS, ()),
    ],
)
def test_generation_config_decides_on_eos_and_the_tokenizers_own_is_always_one(tmp_path, files, expected):
    assert Tokenizer.from_folder(write_folder(tmp_path, **files)).eos_token_ids == expected


@pytest.mark.parametrize("value", ["2", 1.5, -1, True, [[1]], {"a": 1}])
def test_a_malformed_eos_token_id_is_refused_by_name(tmp_path, value):
    folder = write_folder(tmp_path, generation_config={"eos_token_id": value})
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is "):
        Tokenizer.from_folder(folder)


def test_the_post_processor_decides_about_bos(tmp_path):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path))
    assert tokenizer.encode("hello", add_special_tokens=True)[0] == 1
    assert 1 not in tokenizer.encode("hello", add_special_tokens=False)


def test_truncation_and_padding_in_the_file_are_switched_off(tmp_path):
    backend = make_backend("byte-level")
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    folder = write_folder(tmp_path)
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    ids = Tokenizer.from_folder(folder).encode("hello there hello there", add_special_tokens=False)
    assert ids == make_tokenizer().encode("hello there hello there", add_special_tokens=False)
    assert 2 < len(ids) < 50


def test_tokens_named_only_in_the_config_become_special(tmp_path):
    config = {
        "eos_token": {"content": "<end>"},
        "additional_special_tokens": ["<tool>"],
        "eot_token": "<eot>",
    }
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_config=config))
    ids = tokenizer.encode("a<tool><end><eot>", add_special_tokens=False)
    assert len(ids) == 4
    assert [tokenizer.is_special(token_id) for token_id in ids] == [False, True, True, True]
    assert tokenizer.special_tokens == {"eos_token": "<end>", "eot_token": "<eot>"}


def test_a_folder_without_tokenizer_json_is_refused_by_name(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": {"type": "Nonsense"}}'])
def test_a_corrupt_tokenizer_json_is_refused_in_one_line(tmp_path, content):
    write_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is broken") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in caught.value.message
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 5000])
def test_a_corrupt_side_file_is_refused_by_name(tmp_path, name, content):
    write_folder(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Tokenizer.from_folder(tmp_path)


def test_a_malformed_added_tokens_decoder_is_refused(tmp_path):
    write_folder(tmp_path, tokenizer_config={"added_tokens_decoder": {"x": {"content": "a"}}})
    with pytest.raises(CheckpointError, match="added_tokens_decoder is malformed"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
)
def test_an_unknown_decoder_is_refused_with_the_known_ones(tmp_path, decoder):
    write_folder(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(state | {"decoder": decoder}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="known are ByteLevel, Metaspace"):
        Tokenizer.from_folder(tmp_path)


def test_a_lone_surrogate_is_the_callers_error():
    with pytest.raises(InvalidParameterError, match="prompt holds a lone surrogate at character 3") as caught:
        make_tokenizer().encode("abc\ud800", add_special_tokens=False)
    assert caught.value.param == "prompt"


def test_token_bytes_are_exact():
    plain, spaced = make_tokenizer("byte-level"), make_tokenizer("llama")
    assert plain.token_bytes(plain._backend.token_to_id("\u0120the")) == b" the"
    assert spaced.token_bytes(spaced._backend.token_to_id("<0xE4>")) == b"\xe4"
    assert spaced.token_bytes(spaced._backend.token_to_id("\u2581")) == b" "
    assert plain.token_bytes(3) == b"<|im_start|>"
    assert plain.token_bytes(10**6) == plain.token_bytes(-1) == plain.token_bytes(2**40) == b""


def test_an_added_token_of_a_byte_level_vocabulary_stands_for_its_own_text(tmp_path):
    config = {"added_tokens_decoder": {"600": {"content": "\u00e9\u0120"}}}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_config=config))
    (token_id,) = tokenizer.encode("\u00e9\u0120", add_special_tokens=False)
    assert tokenizer.token_bytes(token_id) == "\u00e9\u0120".encode()


def test_a_token_without_bytes_does_not_begin_the_text():
    tokenizer = make_tokenizer("llama")
    ids = [10**6, *tokenizer.encode("hello", add_special_tokens=False)]
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=True, at_start=True)
    assert "".join(map(detokenizer.push, ids)) == tokenizer.decode(ids) == "hello"


def test_all_bytes_of_the_byte_level_alphabet_are_told_apart():
    tokenizer = make_tokenizer("byte-level")
    ids = range(tokenizer.vocab_size)
    assert {tokenizer.token_bytes(i) for i in ids} >= {bytes((byte,)) for byte in range(256)}


@pytest.mark.parametrize("style", STYLES)
def test_the_lower_bound_on_tokens_holds(style):
    tokenizer = make_tokenizer(style)
    for text in ("", "a", "hello world " * 30, "\u4f60" * 50, " " * 100):
        assert tokenizer.num_tokens_min(text) <= len(tokenizer.encode(text, add_special_tokens=False))


def test_vocab_size_is_one_more_than_the_greatest_id():
    tokenizer = make_tokenizer()
    assert tokenizer.vocab_size == 1 + max(tokenizer._backend.get_vocab().values())
