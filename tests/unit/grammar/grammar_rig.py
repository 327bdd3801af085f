"""One compiler for the embedded model's vocabulary, and ways to walk a grammar with a text."""

from functools import cache
from pathlib import Path

import numpy as np

from penstock.core.grammar import GrammarKind, GrammarSpec
from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.grammar.compiler import GrammarCompiler
from penstock.engine.grammar.matcher import Matcher, start_matcher
from penstock.models.embedded_model import embedded_path
from penstock.text.tokenizer import Tokenizer

VOCAB_SIZE = 4096
NUM_WORDS = VOCAB_SIZE // 32


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(embedded_path())


@cache
def tokenizer(folder: Path | None = None) -> Tokenizer:
    return Tokenizer.from_folder(folder or embedded_path())


def spec(kind: str, source: object) -> GrammarSpec:
    if isinstance(source, str):
        return GrammarSpec(kind=GrammarKind(kind), source=source)
    return GrammarSpec.of_json(GrammarKind(kind), source)


def request(grammar: GrammarSpec, *, name: str = "r", **params) -> EngineRequest:
    return EngineRequest(
        request_id=RequestId(name),
        prompt_token_ids=[5],
        params=SamplingParams(max_tokens=8, **params),
        eos_token_ids=tokenizer().eos_token_ids,
        grammar=grammar,
    )


def start(kind: str, source: object = "", **params) -> Matcher:
    """A matcher at the beginning of a grammar."""
    grammar = spec(kind, source)
    compiled = compiler().cached(grammar) or compiler().compile(grammar)
    return start_matcher(compiled, request(grammar, **params), vocab_size=VOCAB_SIZE)


def encode(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def walk(matcher: Matcher, text: str) -> bool:
    """Accept a text by the model's tokens for it; False if one is not allowed."""
    for token_id in encode(text):
        if matcher.num_valid([token_id]) == 0:
            return False
        matcher.accept(token_id)
    return True


def matches(kind: str, source: object, text: str) -> bool:
    """True if the text, and nothing more, satisfies the grammar."""
    matcher = start(kind, source)
    return walk(matcher, text) and matcher.may_end


def allowed(matcher: Matcher, *, drafts: tuple[int, ...] = ()) -> list[set[int]]:
    """The tokens that the masks allow: here, and after each draft."""
    rows = np.full((1 + len(drafts), NUM_WORDS), -1, np.int32)
    matcher.fill(rows, draft_token_ids=drafts)
    bits = np.unpackbits(rows.view(np.uint8), axis=1, bitorder="little")
    return [set(np.flatnonzero(row).tolist()) for row in bits]
