"""Tiny tokenizers made in memory: one byte-level, and three SentencePiece-like ones with byte fallback."""

import functools
import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from penstock.text.tokenizer import Tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "hello world, the quick brown fox jumps over the lazy dog",
    "hello there; stop here. The end of the story.",
    "caf\u00e9 na\u00efve \u00fcber stra\u00dfe \u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f",
    "if x == 1:\n    return [1, 2, 3]\n",
] * 20


@functools.cache
def _byte_level_json() -> str:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return backend.to_str()


@functools.cache
def _metaspace_json(style: str) -> str:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = _normalizer(style)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*SPECIAL, *byte_tokens], limit_alphabet=60, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    state = json.loads(backend.to_str())
    state["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in SPECIAL]
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.decoder = _decoder(style)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return backend.to_str()


def _normalizer(style: str) -> normalizers.Normalizer:
    replace = normalizers.Replace(" ", "\u2581")
    if style == "gemma":
        return replace
    return normalizers.Sequence([normalizers.Prepend("\u2581"), replace])


def _decoder(style: str) -> decoders.Decoder:
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style == "gemma":
        return decoders.Sequence(parts)
    if style == "llama":
        return decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return decoders.Metaspace()


STYLES = ("byte-level", "llama", "gemma", "metaspace")


def make_backend(style: str) -> tokenizers.Tokenizer:
    """A fresh backend of one of `STYLES`."""
    text = _byte_level_json() if style == "byte-level" else _metaspace_json(style)
    return tokenizers.Tokenizer.from_str(text)


def make_tokenizer(style: str = "byte-level") -> Tokenizer:
    """A fresh tokenizer whose end-of-sequence token is `</s>`."""
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(make_backend(style), special_tokens=names, eos_token_ids=(2,))


def write_folder(folder: Path, style: str = "byte-level", **files: object) -> Path:
    """A model folder; `files` are further JSON files by name without suffix."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(make_backend(style).to_str(), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    for name, value in ({"tokenizer_config": settings} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder
