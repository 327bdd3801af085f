"""The stages: each makes what it needs, checks results while it measures, and tells bars."""

import importlib.util
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.device.drive import (
    Answers,
    busy_share,
    drain,
    greedy,
    random_prompt,
    record_all_graphs,
    run_all,
    submit,
    time_decodes,
)
from benchmarks.device.setup import LARGE, SMALL, TINY, Bar, Setup, synchronize
from penstock.engine.build import build_core
from tools.make_checkpoint.shapes import SHAPES

ROOT: Final = Path(__file__).parent.parent.parent
TEST_PROCESSES: Final = 8
Outcome = tuple[dict[str, Any], list[Bar]]
"""Numbers, and those of them that have something to reach."""


def _median_s(run: Callable[[], object], *, rounds: int) -> float:
    """Median wall time with the device waited for, after a round that is not counted."""
    times_s = []
    for _ in range(rounds + 1):
        synchronize()
        began_s = time.perf_counter()
        run()
        synchronize()
        times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s[1:])


def ceilings(setup: Setup) -> Outcome:
    """What the device can do at best: bytes copied (read plus written) and bf16 products a second."""
    size = setup.pick(4 << 30, 1 << 20)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    copy_s = _median_s(lambda: target.copy_(source), rounds=10)
    assert torch.equal(source[-1000:], target[-1000:])
    side = setup.pick(8192, 64)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=setup.device) for _ in range(2))
    matmul_s = _median_s(lambda: a @ b, rounds=10)
    results = {
        "copy_bytes_per_s": 2 * size / copy_s,
        "bf16_flops_per_s": 2 * side**3 / matmul_s,
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
    }
    bars = [
        Bar(name="copy, read plus written", value=results["copy_bytes_per_s"] / 1e12, unit="TB/s"),
        Bar(name=f"bf16 product of {side}", value=results["bf16_flops_per_s"] / 1e12, unit="TFLOP/s"),
    ]
    return results, bars


def _ceilings(setup: Setup) -> dict[str, Any]:
    return setup.earlier("ceilings") or ceilings(setup)[0]


def _pytest(setup: Setup, *arguments: str) -> Outcome:
    """Tests in a process of their own; on the device without the interpreter."""
    env = {**os.environ, "PENSTOCK_TEST_DEVICE": setup.device}
    # What only that machine warns of is no reason to know nothing of its kernels, nor is a first compilation.
    usual = ["-q", "--maxfail=20", "-p", "no:cacheprovider", "-W", "default", "-o", "timeout=300"]
    if not setup.is_dry and importlib.util.find_spec("xdist"):
        usual += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]  # most of the time is the compiler's
    command = [sys.executable, "-m", "pytest", *usual, *arguments]
    code, tail = _told(command, env=env)
    return {"command": " ".join(command[1:]), "tail": tail}, [
        Bar(name="tests pass", value=float(code == 0), at_least=1.0)
    ]


def _told(command: list[str], *, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit status and the end of what a command says, passed on as it comes, lest a time limit cut it off."""
    said = []
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
    return process.returncode, "".join(said)[-6000:]


def kernels(setup: Setup) -> Outcome:
    """Every test of a Triton kernel on the device itself: the contract, and what each has beyond it."""
    only = ("-k", "triton and (rms_norm or alone or one_allowed)") if setup.is_dry else ("-k", "triton")
    contracts = [f"tests/unit/kernels/test_{name}_contract.py" for name in ("kernel", "lora")]
    more = sorted((ROOT / "tests" / "unit").glob("kernels*/test_*triton*.py"))
    return _pytest(setup, *contracts, *(str(path.relative_to(ROOT)) for path in more), *only)


def families(setup: Setup) -> Outcome:
    """Every family through the whole engine, the reference's tokens; recorded steps, with adapters too."""
    only = ("-k", "gpt2 or adapters") if setup.is_dry else ()
    tests = [f"tests/oracle/test_triton_{name}.py" for name in ("families", "graphs")]
    return _pytest(setup, *tests, *only)


def _decode(setup: Setup, model: str, *, at_least: float) -> Outcome:
    config = setup.config(model, max_num_seqs=setup.pick(256, 4), max_model_len=setup.pick(1024, 64))
    core = build_core(config)
    recordings = record_all_graphs(core)
    steps, context = setup.pick(100, 1), setup.pick(512, 3)
    batches = [setup.pick(real, dry) for real, dry in ((1, 1), (8, 1), (64, 2), (256, 2))]
    rows = []
    for idx, batch in enumerate(batches):
        rows.append(time_decodes(core, batch=batch, prompt_tokens=context, steps=steps, name=f"{idx}-"))
        print(rows[-1], flush=True)
    short = time_decodes(core, batch=1, prompt_tokens=setup.pick(32, 2), steps=steps, name="short")
    print(short, flush=True)
    read = core.info.weights_bytes - (0 if model == SMALL else _untied_bytes(setup, model))
    bound_ms = read / _ceilings(setup)["copy_bytes_per_s"] * 1e3
    busy = busy_share(core, batch=batches[2], prompt_tokens=context, steps=setup.pick(50, 1))
    results = {
        "recordings": recordings,
        "weight_bytes_of_a_step": read,
        "bound_ms": bound_ms,
        "batch_1_short_context_ms": short.step_ms,
        "steps_ms": {row.batch: row.step_ms for row in rows},
        "tokens_per_s": {row.batch: row.tokens_per_s for row in rows},
        "busy_share_at_64": busy,
        "load_time_s": core.info.load_time_s,
        "warmup_time_s": core.info.warmup_time_s,
    }
    bars = [
        Bar(
            name=f"{model} decode at batch 1 of the bandwidth bound",
            value=bound_ms / short.step_ms,
            at_least=at_least,
        ),
        Bar(
            name=f"{model} device busy at batch 64",
            value=busy,
            at_least=0.95 if model == LARGE else None,
        ),
        Bar(
            name=f"{model} tokens/s at batch 256 over batch 1",
            value=rows[3].tokens_per_s / rows[0].tokens_per_s,
            at_least=100.0 if model == LARGE else None,
        ),
        Bar(name=f"{model} tokens/s at batch 256", value=rows[3].tokens_per_s),
    ]
    return results, bars


def _untied_bytes(setup: Setup, model: str) -> int:
    """Of the embedding that a step reads a few rows of."""
    shape = SHAPES[TINY if setup.is_dry else model]
    return 0 if shape.tied else shape.vocab_size * shape.hidden_size * 2


def decode_1b(setup: Setup) -> Outcome:
    """Decode of the 1B shape."""
    return _decode(setup, SMALL, at_least=0.6)


def decode_8b(setup: Setup) -> Outcome:
    """Decode of the 8B shape."""
    return _decode(setup, LARGE, at_least=0.8)


def prefill(setup: Setup) -> Outcome:
    """A prompt of 8,192 tokens of the 8B shape in one step, of the measured matmul peak."""
    num_tokens = setup.pick(8192, 16)
    config = setup.config(
        LARGE, max_num_seqs=2, max_model_len=num_tokens + 8, max_num_batched_tokens=num_tokens
    )
    core = build_core(config)
    rng, times_s = random.Random(0), []
    for idx in range(setup.pick(6, 2)):
        prompt = random_prompt(rng, num_tokens=num_tokens, vocab=core.info.vocab_size)
        synchronize()
        seconds, answers = run_all(core, [prompt], [greedy(1)])
        assert len(answers.token_ids["0"]) == 1, idx
        times_s.append(seconds)
        print(f"{num_tokens} tokens in {seconds:.3f} s", flush=True)
    shape = SHAPES[TINY if setup.is_dry else LARGE]
    layer = shape.hidden_size * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    layer += 3 * shape.hidden_size * shape.intermediate_size
    products = 2 * num_tokens * shape.layers * layer
    attention = 2 * num_tokens**2 * shape.heads * shape.head_dim * shape.layers
    best_s = statistics.median(times_s[1:])
    share = (products + attention) / best_s / _ceilings(setup)["bf16_flops_per_s"]
    return {"seconds": times_s, "flops": products + attention, "tokens_per_s": num_tokens / best_s}, [
        Bar(name="prefill of 8,192 tokens (8B) of the product peak", value=share, at_least=0.55)
    ]


def transformers(setup: Setup) -> Outcome:
    """256 requests against `transformers.generate` in static batches of 64, in arrival order."""
    rng = random.Random(0)
    count, static = setup.pick(256, 4), setup.pick(64, 2)
    lens = [(rng.randint(32, 512), rng.randint(16, 256)) for _ in range(count)]
    if setup.is_dry:
        lens = [(4, 2)] * count
    longest = max(a + b for a, b in lens)
    core = build_core(setup.config(LARGE, max_num_seqs=setup.pick(256, 4), max_model_len=longest + 8))
    record_all_graphs(core)
    prompts = [random_prompt(rng, num_tokens=n, vocab=core.info.vocab_size) for n, _ in lens]
    ours_s, answers = run_all(core, prompts, [greedy(n) for _, n in lens])
    assert [len(answers.token_ids[str(i)]) for i in range(count)] == [n for _, n in lens]
    print(f"{count} requests in {ours_s:.2f} s", flush=True)
    del core
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    theirs_s = _static_batches(setup, prompts, [n for _, n in lens], static=static)
    tokens = sum(n for _, n in lens)
    return {"ours_s": ours_s, "theirs_s": theirs_s, "tokens": tokens, "ours_tokens_per_s": tokens / ours_s}, [
        Bar(name="256 requests against transformers.generate", value=theirs_s / ours_s, at_least=5.0)
    ]


def _static_batches(setup: Setup, prompts: list[list[int]], outputs: list[int], *, static: int) -> float:
    """Seconds that transformers takes, each batch as long as its longest answer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(setup.model(LARGE), dtype=torch.bfloat16).to(setup.device)
    model.eval()

    def generate(first: int, max_tokens: int) -> None:
        part = prompts[first : first + static]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in part], device=setup.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=setup.device)
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                pad_token_id=0,
            )

    generate(0, 4)
    synchronize()
    began_s = time.perf_counter()
    for first in range(0, len(prompts), static):
        generate(first, max(outputs[first : first + static]))
    synchronize()
    return time.perf_counter() - began_s


READY: Final = """
import sys, time
from penstock import LLM
llm = LLM(sys.argv[1], device=sys.argv[2], kernels=sys.argv[5], max_model_len=int(sys.argv[3]))
out = llm.generate(["hello"], use_tqdm=False)
print("READY", time.time() - float(sys.argv[4]), llm.info.load_time_s, llm.info.warmup_time_s)
llm.close()
"""


def ready(setup: Setup) -> Outcome:
    """Seconds from a new process to the first answer of the 1B shape; the second start counts."""
    times_s = []
    for _ in range(setup.pick(3, 1)):
        command = [
            sys.executable,
            "-c",
            READY,
            str(setup.model(SMALL)),
            setup.device,
            str(setup.pick(4096, 64)),
        ]
        code, said = _told([*command, str(time.time()), "reference" if setup.is_dry else "triton"])
        assert code == 0, code
        line = next(line for line in said.splitlines() if line.startswith("READY"))
        times_s.append([float(word) for word in line.split()[1:]])
    return {"process_load_warmup_s": times_s}, [
        Bar(name="1B ready, warm cache, first answer included", value=times_s[-1][0], at_most=15.0, unit="s")
    ]


def deterministic(setup: Setup) -> Outcome:
    """1,000 runs of one prompt among random neighbours, and what --deterministic costs at batch 64."""
    runs, seats = setup.pick(1000, 2), setup.pick(48, 2)
    config = setup.config(
        SMALL,
        max_num_seqs=seats,
        max_model_len=setup.pick(1024, 64),
        deterministic=True,
        max_num_batched_tokens=512,
    )
    core = build_core(config)
    rng, answers = random.Random(7), Answers()
    prompt = random_prompt(rng, num_tokens=setup.pick(200, 5), vocab=core.info.vocab_size)
    for idx in range(runs):
        submit(core, f"run{idx}", prompt, greedy(setup.pick(32, 2)))
        for other in range(rng.randint(0, 2)):
            tokens = random_prompt(
                rng, num_tokens=rng.randint(1, setup.pick(500, 5)), vocab=core.info.vocab_size
            )
            submit(core, f"other{idx}-{other}", tokens, greedy(rng.randint(1, setup.pick(64, 2))))
        for _ in range(rng.randint(0, 3)):
            answers.step(core)
    drain(core, answers)
    seen = {tuple(answers.token_ids[f"run{idx}"]) for idx in range(runs)}
    record_all_graphs(core)
    slow = time_decodes(core, batch=seats, prompt_tokens=setup.pick(256, 2), steps=setup.pick(50, 1))
    del core
    fast_core = build_core(setup.config(SMALL, max_num_seqs=seats, max_model_len=setup.pick(1024, 64)))
    record_all_graphs(fast_core)
    fast = time_decodes(fast_core, batch=seats, prompt_tokens=setup.pick(256, 2), steps=setup.pick(50, 1))
    return {"different_answers": len(seen), "deterministic_ms": slow.step_ms, "fast_ms": fast.step_ms}, [
        Bar(name=f"different answers of {runs} runs of one prompt", value=len(seen), at_most=1.0),
        Bar(
            name=f"step with --deterministic over one without, batch {seats}",
            value=slow.step_ms / fast.step_ms,
        ),
    ]


def _module(name: str, setup: Setup) -> Outcome:
    """Another benchmark of this package, in its own process; its table is part of the output."""
    if importlib.util.find_spec(f"benchmarks.device.{name}") is None:
        return {"skipped": f"benchmarks.device.{name} is not in this tree"}, []
    command = [sys.executable, "-m", f"benchmarks.device.{name}", "--out", str(setup.out)]
    code, tail = _told(command + (["--dry-run"] if setup.is_dry else []))
    return {"command": " ".join(command[1:]), "tail": tail}, [
        Bar(name=f"benchmarks.device.{name} ran", value=float(code == 0), at_least=1.0)
    ]


def attention(setup: Setup) -> Outcome:
    """Paged decode attention and prefill attention alone."""
    return _module("attention", setup)


def dense(setup: Setup) -> Outcome:
    """Products, quantized products and experts alone."""
    return _module("dense", setup)


def sampling(setup: Setup) -> Outcome:
    """Draws of every kind alone."""
    return _module("sampling", setup)


STAGES: Final[dict[str, tuple[Callable[[Setup], Outcome], int]]] = {
    "ceilings": (ceilings, 60),
    "kernels": (kernels, 420),
    "families": (families, 300),
    "attention": (attention, 180),
    "dense": (dense, 180),
    "sampling": (sampling, 120),
    "decode_1b": (decode_1b, 150),
    "decode_8b": (decode_8b, 200),
    "prefill": (prefill, 120),
    "transformers": (transformers, 240),
    "ready": (ready, 120),
    "deterministic": (deterministic, 200),
}
"""By name: what runs, and the seconds it may take, making its checkpoint included."""
