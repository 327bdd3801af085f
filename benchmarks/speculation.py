"""What speculation brings: a draft model at batch 1, prompt lookup on a repeated record, and a batch of 64.

Target: the layers of Qwen2.5-0.5B with a vocabulary of 8,192; draft: its first two layers. All weights are
random; what the later layers add to the residual is scaled so that the draft is right in 0.8 of its guesses,
which is measured here and checked. Bound at batch 1: with acceptance r and k drafts a step yields
1 + r + ... + r^k tokens (3.4 for k = 4), and takes one pass over 24 layers and k over two: 1 + 4 * 0.1 = 1.4
times as long while weights are what is waited for, so 2.4. Both sides run in one process, in turns, and their
answers are compared.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from benchmarks.report import RESULTS, arguments, finish, median
from penstock import LLM
from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig, SpeculativeConfig
from penstock.engine.core import EngineCore
from penstock.models.embedded_model import embedded_draft_path, embedded_path
from tools.embedded.instructions import make_conversation
from tools.make_checkpoint.checkpoint import make_checkpoint
from tools.make_checkpoint.shapes import SHAPES

VOCAB: Final = 8192
DRAFT_LAYERS: Final = 2
SCALE: Final = 0.235
"""Of what each later layer adds to the residual: gives the acceptance below."""
TEMPERATURE: Final = 0.5
ACCEPTANCE: Final = (0.78, 0.82)
BARS: Final = {"batch 1": 1.7, "prompt lookup": 2.0, "batch 64": 0.98, "embedded draft": 0.98}
"""The last one is the worst case: a draft nearly as dear as the model, whose steps take a millisecond."""
MAX_PROMPT_ID: Final = 4000
EMBEDDED_TOKENS: Final = 400
RECORD_TOKENS: Final = (120, 180)
RESIDUAL: Final = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def make_pair(folder: Path, *, layers: int, scale: float) -> tuple[Path, Path]:
    """A target and the draft that is its first two layers."""
    shape = replace(SHAPES["qwen2.5-0.5b"], vocab_size=VOCAB, layers=layers)
    target = make_checkpoint(folder / "target", shape)
    (file,) = target.glob("*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        layer = name.split("layers.")[1].split(".")[0] if "layers." in name else "0"
        if int(layer) >= DRAFT_LAYERS and name.endswith(RESIDUAL):
            tensors[name] = (tensor.float() * scale).to(tensor.dtype)
    save_file(tensors, file)
    draft = folder / "draft"
    shutil.copytree(target, draft, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((draft / "config.json").read_text())
    config["num_hidden_layers"] = DRAFT_LAYERS
    config.pop("layer_types", None)
    (draft / "config.json").write_text(json.dumps(config))
    kept = {name: tensor for name, tensor in tensors.items() if _is_early(name)}
    save_file(kept, draft / "model.safetensors")
    return target, draft


def _is_early(name: str) -> bool:
    return "layers." not in name or int(name.split("layers.")[1].split(".", maxsplit=1)[0]) < DRAFT_LAYERS


def make_core(model: Path, speculative: SpeculativeConfig | None) -> EngineCore:
    """An engine on the native kernels."""
    return build_core(
        EngineConfig(
            model_path=str(model),
            kernels="native",
            max_model_len=1024,
            scheduler=SchedulerConfig(max_num_seqs=64, enable_prefix_caching=False),
            kv=KvConfig(num_blocks=4096),
            speculative=speculative,
        )
    )


@dataclass(slots=True, kw_only=True)
class Decoded:
    """One run: answers, and what the steps after every first token gave."""

    answers: dict[str, list[int]]
    num_tokens: int = 0
    seconds: float = 0.0
    num_guesses: int = 0
    num_right: int = 0
    num_runs: int = 0
    """Runs of guesses."""
    num_cut: int = 0
    """Of those, with a wrong guess."""

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens per second."""
        return self.num_tokens / self.seconds


def decode_in_turns(
    plain: EngineCore, drafting: EngineCore, asked: Sequence[EngineRequest]
) -> tuple[Decoded, Decoded]:
    """The same requests on both engines, a step here and a step there: what disturbs one disturbs both."""
    sides = (plain, drafting)
    runs = tuple(Decoded(answers={request.request_id: [] for request in asked}) for _ in sides)
    for core in sides:
        for request in asked:
            core.add(request)
    while any(core.has_work for core in sides):
        for core, run in zip(sides, runs, strict=True):
            if core.has_work:
                step(core, run)
    return runs[0], runs[1]


def step(core: EngineCore, run: Decoded) -> None:
    """One step, and what it gave; counted once every request has its first token."""
    is_decoding = all(run.answers.values())
    began_s = time.perf_counter()
    output = core.step()
    took_s = time.perf_counter() - began_s
    for delta in output.deltas:
        assert delta.error is None, delta.error
        run.answers[delta.request_id].extend(delta.token_ids)
    if is_decoding:
        run.seconds += took_s
        run.num_tokens += output.stats.num_generated_tokens
    accepted = sum(output.stats.num_accepted_tokens)
    run.num_guesses += output.stats.num_draft_tokens
    run.num_right += accepted
    run.num_runs += output.stats.num_drafts
    run.num_cut += int(output.stats.num_drafts == 1 and accepted < output.stats.num_draft_tokens)


def requests(*, num: int, max_tokens: int, seed: int) -> list[EngineRequest]:
    """Random prompts with seeded draws."""
    rng = random.Random(seed)
    params = SamplingParams(temperature=TEMPERATURE, ignore_eos=True, max_tokens=max_tokens)
    return [
        EngineRequest(
            request_id=RequestId(f"r{i}"),
            prompt_token_ids=[rng.randrange(MAX_PROMPT_ID) for _ in range(32)],
            params=SamplingParams(**{**_fields(params), "seed": seed * 1000 + i}),
        )
        for i in range(num)
    ]


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.__struct_fields__}


def compare(
    plain: EngineCore, drafting: EngineCore, *, num: int, max_tokens: int, rounds: int, seed: int
) -> dict[str, Any]:
    """Both engines in turns over the same requests."""
    runs: dict[str, list[Decoded]] = {"plain": [], "drafting": []}
    for idx in range(rounds + 1):
        asked = requests(num=num, max_tokens=max_tokens, seed=seed + idx)
        pair = dict(zip(("plain", "drafting"), decode_in_turns(plain, drafting, asked), strict=True))
        assert pair["plain"].answers == pair["drafting"].answers, "speculation changed an answer"
        for name, run in pair.items() if idx else ():  # the first round warms up
            runs[name].append(run)
    rates = {name: [run.tokens_per_s for run in each] for name, each in runs.items()}
    ratios = [new / old for new, old in zip(rates["drafting"], rates["plain"], strict=True)]
    drafted = runs["drafting"]
    right, cut = sum(run.num_right for run in drafted), sum(run.num_cut for run in drafted)
    return {
        "plain_tokens_per_s": round(median(rates["plain"]), 1),
        "drafting_tokens_per_s": round(median(rates["drafting"]), 1),
        "ratio": round(median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "acceptance": round(right / max(1, right + cut), 3) if num == 1 else None,
        "guesses": sum(run.num_guesses for run in drafted),
        "guesses_a_run": round(
            sum(r.num_guesses for r in drafted) / max(1, sum(r.num_runs for r in drafted)), 2
        ),
        "answers_equal": True,
    }


def embedded_draft(*, rounds: int, seed: int) -> dict[str, Any]:
    """The embedded model beside its own draft, one answer at a time."""
    config = SpeculativeConfig(method="draft_model", model=str(embedded_draft_path()))
    plain, drafting = make_core(embedded_path(), None), make_core(embedded_path(), config)
    return compare(plain, drafting, num=1, max_tokens=EMBEDDED_TOKENS, rounds=rounds, seed=seed)


def _guesses_a_run(runs: Sequence[Decoded]) -> float:
    return sum(run.num_guesses for run in runs) / max(1, sum(run.num_runs for run in runs))


def prompt_lookup(*, num_records: int, rounds: int) -> dict[str, Any]:
    """The embedded model repeats records; only those that it gets right count."""
    params = SamplingParams(temperature=0.0, max_tokens=400)
    sides = {
        "plain": LLM(max_num_seqs=4),
        "ngram": LLM(max_num_seqs=4, speculative_config={"method": "ngram"}),
    }
    rates: dict[str, list[float]] = {"plain": [], "ngram": []}
    num_right = num_asked = 0
    try:
        for index in range(1000):
            talk = make_conversation(5, index, kind="long_repeat")
            turns = [dict(turn) for turn in talk.messages[:-1]]
            if len(turns) != 1 or talk.tools:
                continue
            first = sides["plain"].chat(turns, params, use_tqdm=False)[0].outputs[0]
            if not RECORD_TOKENS[0] <= len(first.token_ids) <= RECORD_TOKENS[1]:
                continue
            num_asked += 1
            if first.text != talk.expected:
                continue
            num_right += 1
            for _ in range(rounds):
                for name, llm in sides.items():
                    rates[name].append(_decode_rate(llm, turns, params, expected=talk.expected))
            if num_right == num_records:
                break
    finally:
        for llm in sides.values():
            llm.close()
    ratio = median(rates["ngram"]) / median(rates["plain"])
    return {
        "records": num_right,
        "records_tried": num_asked,
        "plain_tokens_per_s": round(median(rates["plain"]), 1),
        "ngram_tokens_per_s": round(median(rates["ngram"]), 1),
        "ratio": round(ratio, 3),
        "answers_equal": True,
    }


def _decode_rate(llm: LLM, turns: list[dict[str, str]], params: SamplingParams, *, expected: str) -> float:
    """Tokens a second after the first, which the request's own record tells."""
    began_s = time.perf_counter()
    llm.chat(turns, replace_max(params, 1), use_tqdm=False)
    first_s = time.perf_counter() - began_s
    began_s = time.perf_counter()
    output = llm.chat(turns, params, use_tqdm=False)[0].outputs[0]
    whole_s = time.perf_counter() - began_s
    assert output.text == expected, "the record was not repeated"
    return (len(output.token_ids) - 1) / (whole_s - first_s)


def replace_max(params: SamplingParams, max_tokens: int) -> SamplingParams:
    """The same parameters with another limit."""
    return SamplingParams(**{**_fields(params), "max_tokens": max_tokens})


def measure_pair(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The draft model's two comparisons, or one of them."""
    target, draft = make_pair(folder, layers=4 if options.tiny else 24, scale=options.scale)
    config = SpeculativeConfig(method="draft_model", model=str(draft))
    plain, drafting = make_core(target, None), make_core(target, config)
    results = {}
    for num, max_tokens, rounds in ((1, 128, options.rounds), (64, 32, min(2, options.rounds))):
        name = f"batch {num}"
        if options.only in (None, name):
            results[name] = compare(
                plain,
                drafting,
                num=num,
                max_tokens=8 if options.tiny else max_tokens,
                rounds=rounds,
                seed=options.seed,
            )
    return results


def earlier_parts() -> dict[str, Any]:
    """What earlier runs with `--only` wrote."""
    file = RESULTS / "speculation.json"
    return dict(json.loads(file.read_text())["results"]) if file.is_file() else {}


def main() -> int:
    """All three comparisons; fails where a bar is missed or the acceptance is not what it should be."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--scale", type=float, default=SCALE)
    parser.add_argument("--only", choices=list(BARS), help="one part, written beside those written before")
    options = parser.parse_args()
    results = earlier_parts() if options.only else {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        if options.only not in {"prompt lookup", "embedded draft"}:
            results |= measure_pair(Path(folder), options)
        if options.only in (None, "prompt lookup"):
            num_records = 2 if options.tiny else 6
            results["prompt lookup"] = prompt_lookup(num_records=num_records, rounds=min(2, options.rounds))
        if options.only in (None, "embedded draft"):
            results["embedded draft"] = embedded_draft(rounds=options.rounds, seed=options.seed)
    ok = all(results[name]["ratio"] >= bar for name, bar in BARS.items() if name in results)
    if "batch 1" in results:
        ok &= ACCEPTANCE[0] <= results["batch 1"]["acceptance"] <= ACCEPTANCE[1]
    sizes = {"vocabulary": VOCAB, "draft_layers": DRAFT_LAYERS, "scale": options.scale, "bars": BARS}
    return finish("speculation", options=options, sizes=sizes, results=results, ok=ok or options.tiny)


if __name__ == "__main__":
    sys.exit(main())
