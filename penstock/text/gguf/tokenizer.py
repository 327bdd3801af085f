"""The `tokenizer.json` that a GGUF file's metadata describes, as the `tokenizers` library reads it.

Two kinds are known by `tokenizer.ggml.model`: `gpt2` is byte-level BPE with the file's merges, cut by the
pattern that `tokenizer.ggml.pre` names; `llama` is SentencePiece's BPE, whose merges follow from the scores.
All others are refused.

**Source:** llama.cpp, src/llama-vocab.cpp, for patterns, defaults and the order of merges; Kudo and
Richardson, SentencePiece, 2018.
"""

from collections import Counter
from typing import Any, Final

from penstock.core.errors import UnsupportedModelError
from penstock.text.gguf.header import Metadata

Json = dict[str, Any]  # a piece of tokenizer.json

MODEL: Final = "tokenizer.ggml.model"
TOKENS: Final = "tokenizer.ggml.tokens"
CONTROL, USER_DEFINED = 3, 4
METASPACE: Final = "\u2581"
GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2: Final = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS: Final = {
    "default": (GPT2,),
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama3": (LLAMA3,),
    "llama-v3": (LLAMA3,),
    "llama-bpe": (LLAMA3,),
    "qwen2": (QWEN2,),
    "deepseek-r1-qwen": (QWEN2,),
    "tekken": (TEKKEN,),
    "gpt-4o": (GPT4O,),
}
"""By `tokenizer.ggml.pre`: the patterns that cut a text, one after the other."""
WHOLE_TOKENS_FIRST: Final = frozenset({"llama3", "llama-v3", "llama-bpe", "tekken"})
"""Where a piece that is a token stays whole, whatever the merges say."""
BEGINS_BY_DEFAULT: Final = frozenset({"llama3", "llama-v3", "llama-bpe", "tekken"})
"""Byte-level vocabularies whose texts begin with BOS if the file does not say otherwise."""
NORMALIZED: Final = frozenset({"qwen2", "deepseek-r1-qwen"})
"""Whose texts are brought into Unicode's form NFC."""
END_WORDS: Final = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>",
)  # fmt: skip
"""Control tokens that end an answer even where the file does not say so, as llama.cpp takes them."""


def _token_types(metadata: Metadata, count: int) -> list[int]:
    key = "tokenizer.ggml.token_type"
    return [int(each) for each in metadata.numbers(key, length=count)] if key in metadata else [1] * count


def read_tokens(metadata: Metadata) -> list[str]:
    """The vocabulary in the order of ids.

    Raises:
        CheckpointError: it is empty or a token stands there twice.
    """
    tokens = metadata.texts(TOKENS)
    if not tokens:
        raise metadata.wrong(TOKENS, "an array of strings")
    if len(set(tokens)) != len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise metadata.wrong(TOKENS, f"tokens of which none stands there twice, as {twice[:80]!r} does")
    return tokens


def special_ids(metadata: Metadata, *, num_tokens: int) -> dict[str, int]:
    """Ids by their names: bos, eos, eot, eom, unknown, padding; those that the file has."""
    names = ("bos", "eos", "eot", "eom", "unknown", "padding")
    keys = {name: f"tokenizer.ggml.{name}_token_id" for name in names}
    return {
        name: metadata.integer(key, low=0, high=num_tokens - 1)
        for name, key in keys.items()
        if key in metadata
    }


def _added_tokens(tokens: list[str], types: list[int]) -> list[Json]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, **plain, "special": kind == CONTROL}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in {CONTROL, USER_DEFINED}
    ]


def _post_processor(token: str, token_id: int) -> Json:
    text = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    first = [{"SpecialToken": {"id": token, "type_id": 0}}, text[0]]
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, text[1]],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _byte_level(metadata: Metadata, tokens: list[str]) -> Json:
    pre = metadata.supported("tokenizer.ggml.pre", tuple(PATTERNS), "default")
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in PATTERNS[pre]
    ]
    spell = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    merges = metadata.texts("tokenizer.ggml.merges")
    pairs = [merge.split(" ") for merge in merges]
    for merge, pair in zip(merges, pairs, strict=True):
        if len(pair) != 2:
            raise metadata.wrong("tokenizer.ggml.merges", f"pairs with one space between, not {merge[:80]!r}")
    return {
        "normalizer": {"type": "NFC"} if pre in NORMALIZED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, spell]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(tokens, pairs, ignore_merges=pre in WHOLE_TOKENS_FIRST),
    }


def _bpe(tokens: list[str], merges: list[list[str]], **options: Any) -> Json:  # options of the library
    plain = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
    }
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return {"type": "BPE", **plain, **flags, **options, "vocab": vocabulary, "merges": merges}


def _merges_by_score(tokens: list[str], scores: list[float]) -> list[list[str]]:
    """Every way to join a token from two others, the best score first.

    SentencePiece joins, of all neighbours whose union is a token, those of the best score.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    found: list[tuple[float, int, int, str, str]] = []
    for i, token in enumerate(tokens):
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in ids and right in ids:
                found.append((-scores[i], i, at, left, right))
    return [[left, right] for _, _, _, left, right in sorted(found)]


def _sentence_piece(metadata: Metadata, tokens: list[str], ids: dict[str, int]) -> Json:
    is_gemma = metadata.text("general.architecture", "").startswith("gemma")
    if is_gemma:  # its scores do not follow its merges, its order does; runs of spaces are spelled as such
        tokens = [METASPACE * len(token) if token.strip(" ") == "" and token else token for token in tokens]
        scores = [float(-i) for i in range(len(tokens))]
    else:
        scores = metadata.numbers("tokenizer.ggml.scores", length=len(tokens))
    has_prefix = metadata.boolean("tokenizer.ggml.add_space_prefix", not is_gemma)
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": METASPACE}
    to_space = {"type": "Replace", "pattern": {"String": METASPACE}, "content": " "}
    normalizers = [{"type": "Prepend", "prepend": METASPACE}, to_mark] if has_prefix else [to_mark]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": _bpe(
            tokens,
            _merges_by_score(tokens, scores),
            unk_token=tokens[ids["unknown"]] if "unknown" in ids else None,
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _begins_with_bos(metadata: Metadata, kind: str) -> bool:
    pre = metadata.text("tokenizer.ggml.pre", "default")
    return metadata.boolean("tokenizer.ggml.add_bos_token", kind == "llama" or pre in BEGINS_BY_DEFAULT)


def tokenizer_fields(metadata: Metadata) -> Json:
    """What `tokenizer.json` would hold.

    Raises:
        CheckpointError: an entry is missing or does not fit the vocabulary.
        UnsupportedModelError: another kind of tokenizer or pattern; says which are known.
    """
    kind = metadata.supported(MODEL, ("gpt2", "llama"), "")
    if metadata.boolean("tokenizer.ggml.add_eos_token", False):
        raise UnsupportedModelError(
            f"{metadata.source}: metadata 'tokenizer.ggml.add_eos_token' is True, which is not supported",
            param="tokenizer.ggml.add_eos_token",
        )
    tokens = read_tokens(metadata)
    ids = special_ids(metadata, num_tokens=len(tokens))
    fields = _byte_level(metadata, tokens) if kind == "gpt2" else _sentence_piece(metadata, tokens, ids)
    begins = _begins_with_bos(metadata, kind) and "bos" in ids
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, _token_types(metadata, len(tokens))),
        "post_processor": _post_processor(tokens[ids["bos"]], ids["bos"]) if begins else None,
        **fields,
    }


def _chat_template(metadata: Metadata) -> object:
    default = metadata.scalar("tokenizer.chat_template")
    if default is not None and not isinstance(default, str):
        raise metadata.wrong("tokenizer.chat_template", "a string")
    named = metadata.texts("tokenizer.chat_templates")
    if not named:
        return default
    entries = [{"name": "default", "template": default}] if default is not None else []
    return entries + [
        {"name": name, "template": metadata.text(f"tokenizer.chat_template.{name}")} for name in named
    ]


def settings_fields(metadata: Metadata) -> Json:
    """What `tokenizer_config.json` would hold: named special tokens and the chat template."""
    tokens = read_tokens(metadata)
    ids = special_ids(metadata, num_tokens=len(tokens))
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {name: tokens[ids[short]] for name, short in names.items() if short in ids}
    template = _chat_template(metadata)
    return {**named, **({} if template is None else {"chat_template": template})}


def generation_fields(metadata: Metadata) -> Json:
    """What `generation_config.json` would hold: the tokens that end an answer."""
    tokens = read_tokens(metadata)
    ids = special_ids(metadata, num_tokens=len(tokens))
    types = _token_types(metadata, len(tokens))
    ends = [ids[name] for name in ("eos", "eot", "eom") if name in ids]
    words = [i for i, token in enumerate(tokens) if token in END_WORDS and types[i] == CONTROL]
    found = list(dict.fromkeys([*ends, *words]))
    return {"eos_token_id": found} if found else {}
