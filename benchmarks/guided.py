"""What guided decoding costs and saves.

Overhead: 32 answers under a JSON Schema and 32 without, on two engines over the same checkpoint whose steps
are made in turns, one each, with jump-forward off; the bar is for the median of the pairs' ratios, since the
host's speed jumps from second to second. A bound first: a mask is filled in some 10 to 50 us, so 32
of them take 0.3 to 1.6 ms of a step; a row's mask is applied where the row is read anyway.

Jump-forward: steps for one answer under a schema with long keys, with and without; the same tokens.

Refusals: hostile grammars sent while the 32 answers run; time to the answer, and what a step takes meanwhile.
"""

import sys
import time
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.json_schema_suite import run_suite
from benchmarks.report import arguments, finish, median, percentiles
from penstock.core.grammar import GrammarKind, GrammarSpec
from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from penstock.engine.core import EngineCore
from penstock.engine.grammar.compiler import GrammarCompiler
from penstock.models.embedded_model import embedded_path
from penstock.text.tokenizer import Tokenizer

BATCH: Final = 32
PROMPT_TOKENS: Final = 32
OVERHEAD_MAX: Final = 1.05
STEPS_MAX: Final = 0.7
REFUSAL_MAX_MS: Final = 300.0
RECORDS: Final = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "kind": {"enum": ["alpha", "beta", "gamma"]},
            "count": {"type": "integer", "minimum": 0},
            "tags": {"type": "array", "items": {"type": "string"}},
            "is_open": {"type": "boolean"},
        },
        "required": ["name", "kind", "count", "tags", "is_open"],
        "additionalProperties": False,
    },
}
LONG_KEYS: Final = {
    "type": "object",
    "properties": {
        "customer_identification_number": {"type": "integer", "minimum": 0, "maximum": 99},
        "preferred_method_of_payment": {"enum": ["card", "cash"]},
        "has_accepted_the_general_terms": {"type": "boolean"},
    },
    "required": [
        "customer_identification_number",
        "preferred_method_of_payment",
        "has_accepted_the_general_terms",
    ],
    "additionalProperties": False,
}
HOSTILE: Final = {
    "20,000 words": (GrammarKind.REGEX, "|".join(f"w{i}" for i in range(20_000))),
    "a large prime": (GrammarKind.JSON_SCHEMA, '{"type": "integer", "multipleOf": 999999937}'),
    "nested repetitions": (GrammarKind.REGEX, "((a{1,999}b){1,999}c){1,999}("),
    "2,000 lexemes": (
        GrammarKind.GRAMMAR,
        f"start: ({' | '.join(f'T{i}' for i in range(2000))})*\n"
        + "\n".join(f"T{i}: /[a-z]{{1,30}}{i}.*/" for i in range(2000)),
    ),
    "open parentheses": (GrammarKind.REGEX, "(" * 100_000),
}


def make_core(folder: Path, *, batch: int, num_tokens: int, jumps: bool) -> EngineCore:
    """The engine over a checkpoint."""
    return build_core(
        EngineConfig(
            model_path=str(folder),
            max_model_len=num_tokens,
            scheduler=SchedulerConfig(max_num_seqs=batch, enable_jump_forward=jumps),
            kv=KvConfig(num_blocks=batch * (num_tokens // 16 + 2)),
        )
    )


def ask(
    name: str, *, grammar: GrammarSpec | None, max_tokens: int, seed: int, **params: Any
) -> EngineRequest:
    """A request whose prompt depends on its seed alone."""
    return EngineRequest(
        request_id=RequestId(name),
        prompt_token_ids=[300 + (7 * seed + 3 * j) % 3000 for j in range(PROMPT_TOKENS)],
        params=SamplingParams(max_tokens=max_tokens, seed=seed, **params),
        grammar=grammar,
    )


def fill(core: EngineCore, *, batch: int, num_tokens: int, grammar: GrammarSpec | None) -> None:
    """Queue requests and step until all decode."""
    for i in range(batch):
        core.add(ask(str(i), grammar=grammar, max_tokens=num_tokens - PROMPT_TOKENS, seed=i, ignore_eos=True))
    while any(report.num_generated_tokens < 2 for report in core.requests()):
        core.step()


def timed_step(core: EngineCore) -> float:
    """Seconds of one step, which must serve the whole batch."""
    began_s = time.perf_counter()
    core.step()
    return time.perf_counter() - began_s


def overhead(free: EngineCore, guided: EngineCore, *, batch: int, num_steps: int) -> dict[str, Any]:
    """Times of steps without and with grammars, made in turns."""
    num_tokens = PROMPT_TOKENS + num_steps + 400
    schema = GrammarSpec.of_json(GrammarKind.JSON_SCHEMA, RECORDS)
    fill(free, batch=batch, num_tokens=num_tokens, grammar=None)
    fill(guided, batch=batch, num_tokens=num_tokens, grammar=schema)
    pairs = [(timed_step(free), timed_step(guided)) for _ in range(num_steps)]
    assert all(len(core.requests()) == batch for core in (free, guided)), "nobody ends before the last step"
    without_s, with_s = (median(column) for column in zip(*pairs, strict=True))
    return {
        "tpot_without_ms": percentiles([a for a, _ in pairs], scale=1e3),
        "tpot_with_ms": percentiles([b for _, b in pairs], scale=1e3),
        "ratio_of_medians": round(with_s / without_s, 4),
        "median_of_ratios": round(median([b / a for a, b in pairs]), 4),
    }


def refusals(core: EngineCore) -> dict[str, Any]:
    """Milliseconds to each refusal while the core's answers run, and the longest step meanwhile."""
    found: dict[str, Any] = {"step_alone_ms": percentiles([timed_step(core) for _ in range(10)], scale=1e3)}
    for name, (kind, source) in HOSTILE.items():
        request = ask(name, grammar=GrammarSpec(kind=kind, source=source), max_tokens=8, seed=0)
        began_s, done_s = time.perf_counter(), 0.0

        def note() -> None:
            nonlocal done_s
            done_s = time.perf_counter()

        core.grammars.wake = note
        core.grammars.submit(request)
        steps_s = [timed_step(core)]
        while not (done := core.grammars.take_done()):
            steps_s.append(timed_step(core))
        assert isinstance(done[0].outcome, Exception) or name == "20,000 words", name
        found[name] = {
            "answered_after_ms": round((done_s - began_s) * 1e3, 1),
            "is_refused": isinstance(done[0].outcome, Exception),
            "longest_step_ms": round(max(steps_s) * 1e3, 1),
        }
    return found


def jump_forward() -> dict[str, Any]:
    """Steps and tokens of an answer with and without, on the embedded model."""
    schema = GrammarSpec.of_json(GrammarKind.JSON_SCHEMA, LONG_KEYS)
    steps, answers = [], []
    for jumps in (True, False):
        core = make_core(embedded_path(), batch=1, num_tokens=512, jumps=jumps)
        core.add(ask("a", grammar=schema, max_tokens=200, seed=1, temperature=0.0))
        tokens: list[int] = []
        num_steps = 0
        while core.has_work:
            num_steps += 1
            for delta in core.step().deltas:
                tokens += delta.token_ids
        steps.append(num_steps)
        answers.append(tokens)
    return {
        "tokens": len(answers[0]),
        "steps_with": steps[0],
        "steps_without": steps[1],
        "ratio": round(steps[0] / steps[1], 3),
        "same_tokens": answers[0] == answers[1],
    }


def main() -> int:
    """Every part; the exit code says whether the bars were met."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint with a tokenizer of its size")
    parser.add_argument("--suite", type=Path, default=Path("tests/data/json_schema_suite"))
    options = parser.parse_args()
    batch, num_steps = (2, 4) if options.tiny else (BATCH, 160)
    num_tokens = PROMPT_TOKENS + num_steps + 400
    results: dict[str, Any] = {"jump_forward": jump_forward()}
    counts = run_suite(
        options.suite, GrammarCompiler(embedded_path()), Tokenizer.from_folder(embedded_path())
    )
    results["json_schema_suite"] = {
        "schemas": counts.schemas,
        "compiled": counts.compiled,
        "valid": counts.valid,
        "valid_accepted": counts.valid_accepted,
        "invalid": counts.invalid,
        "wrongly_accepted": len(counts.wrongly_accepted),
        "refused_by_file": counts.refused,
    }
    with torch.inference_mode():  # as around the engine's loop
        free, guided = (
            make_core(options.model, batch=batch, num_tokens=num_tokens, jumps=False) for _ in range(2)
        )
        vocab_size = free.info.vocab_size
        results["overhead"] = overhead(free, guided, batch=batch, num_steps=num_steps)
        results["refusals"] = refusals(guided)
    slowest_ms = max(
        each["answered_after_ms"] for each in results["refusals"].values() if each.get("is_refused")
    )
    ok = (
        results["jump_forward"]["same_tokens"]
        and results["jump_forward"]["ratio"] <= STEPS_MAX
        and not counts.wrongly_accepted
        and (options.tiny or results["overhead"]["median_of_ratios"] < OVERHEAD_MAX)
        and (options.tiny or slowest_ms < REFUSAL_MAX_MS)
    )
    sizes = {"batch": batch, "steps": num_steps, "prompt_tokens": PROMPT_TOKENS, "vocab_size": vocab_size}
    return finish("guided", options=options, sizes=sizes, results=results, ok=ok)


if __name__ == "__main__":
    sys.exit(main())
