"""The required tests of the JSON-Schema-Test-Suite, against the grammar compiler.

A schema compiles or is refused with a reason; an instance, written as `json.dumps` does, is accepted or not.
The tests in `tests/oracle` and `benchmarks/guided.py` call it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from penstock.core.errors import InvalidParameterError
from penstock.core.grammar import GrammarKind, GrammarSpec
from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.grammar.compiler import GrammarCompiler
from penstock.engine.grammar.matcher import Matcher, start_matcher
from penstock.text.tokenizer import Tokenizer


@dataclass(slots=True, kw_only=True)
class Counts:
    """What came of the suite."""

    schemas: int = 0
    compiled: int = 0
    valid: int = 0
    valid_accepted: int = 0
    invalid: int = 0
    wrongly_accepted: list[str] = field(default_factory=list)
    """Invalid instances that a grammar let pass, by name."""
    refused: dict[str, int] = field(default_factory=dict)
    """Refused schemas by file."""


def run_suite(folder: Path, compiler: GrammarCompiler, tokenizer: Tokenizer) -> Counts:
    """Every case of every file in `folder`; a few seconds."""
    counts = Counts()
    for path in sorted(folder.glob("*.json")):
        for case in json.loads(path.read_text(encoding="utf-8")):
            counts.schemas += 1
            start = _start(case["schema"], compiler, vocab_size=tokenizer.vocab_size)
            if start is None:
                counts.refused[path.stem] = counts.refused.get(path.stem, 0) + 1
                continue
            counts.compiled += 1
            for test in case["tests"]:
                is_accepted = _accepts(start.fork(), test["data"], tokenizer)
                counts.valid += test["valid"]
                counts.invalid += not test["valid"]
                counts.valid_accepted += test["valid"] and is_accepted
                if is_accepted and not test["valid"]:
                    name = f"{path.stem}: {case['description']}: {test['description']}"
                    counts.wrongly_accepted.append(name)
    return counts


def _start(schema: object, compiler: GrammarCompiler, *, vocab_size: int) -> Matcher | None:
    spec = GrammarSpec.of_json(GrammarKind.JSON_SCHEMA, schema)
    request = EngineRequest(
        request_id=RequestId("r"), prompt_token_ids=[0], params=SamplingParams(), grammar=spec
    )
    try:
        return start_matcher(compiler.compile(spec), request, vocab_size=vocab_size)
    except InvalidParameterError:
        return None


def _accepts(matcher: Matcher, instance: object, tokenizer: Tokenizer) -> bool:
    text = json.dumps(instance, ensure_ascii=False)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    if matcher.num_valid(token_ids) < len(token_ids):
        return False
    for token_id in token_ids:
        matcher.accept(token_id)
    return matcher.may_end
