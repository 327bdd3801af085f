"""Write a checkpoint in a quantized format, or measure the perplexity of the embedded model in all of them.

    python -m tools.quantized write --form gptq-g128 --model FOLDER --out FOLDER
    python -m tools.quantized write --form Q4_0 --model FOLDER --out FILE.gguf
    python -m tools.quantized perplexity --corpus ../shared/corpus > benchmarks/results/quantized.json

Perplexity is that of `tools/embedded/quantized`: the same windows, the native kernels, bfloat16. Beside it
stand the errors of logits on the first window, against the model as it is on the same kernels.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.report import environment
from penstock.kernels.options import KernelOptions, KvCacheDtype
from penstock.models.interface import LoadedModel
from penstock.models.loader import load_model
from tools.embedded.data import encode_held_out
from tools.embedded.evaluate import WINDOW
from tools.embedded.quantized import BOS_ID, Scorer
from tools.quantized.checkpoint import write_quantized
from tools.quantized.forms import FORMS
from tools.quantized.gguf_file import TYPES, write_gguf

MEASURED: Final = (
    "awq-g128", "awq-g64-symmetric", "gptq-g128", "gptq-g32", "gptq-g32-act-order", "gptq-int8-all-inputs",
    "w4a16-g128", "w8a8", "fp8-tensor", "fp8-channel", "fp8-block", "nf4", "nf4-nested", "bitsandbytes-int8",
    "Q8_0", "Q6_K", "Q4_K", "Q4_0",
)  # fmt: skip
EMBEDDED: Final = Path("penstock/models/embedded")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one way to keep the model."""

    perplexity: float
    logits: Tensor
    """[WINDOW, vocab_size] of the first window."""
    quantization: str
    weights_bytes: int


def write(form: str, source: Path, target: Path) -> Path:
    """Write a checkpoint in a form of `FORMS`, or a GGUF file in a type of `TYPES`; returns it."""
    if form not in TYPES:
        return write_quantized(source, target, form)
    target = target.with_suffix(".gguf")
    write_gguf(source, target, kind=form, pre="smollm")
    return target


def _load(path: Path, kv_cache_dtype: KvCacheDtype) -> LoadedModel:
    options = KernelOptions(kv_cache_dtype=kv_cache_dtype)
    return load_model(path, dtype="bfloat16", kernels="native", options=options)


def measure(path: Path, ids: Tensor, *, kv_cache_dtype: KvCacheDtype = "auto") -> Figures:
    """Perplexity over `ids`, and the logits of their first window."""
    loaded = _load(path, kv_cache_dtype)
    scorer = Scorer(loaded)
    window = torch.cat((torch.tensor([BOS_ID]), ids))[:WINDOW]
    return Figures(
        perplexity=scorer.perplexity(ids),
        logits=scorer.logits(window),
        quantization=loaded.quantization,
        weights_bytes=loaded.weights_bytes,
    )


def _row(figures: Figures, plain: Figures) -> dict[str, object]:
    errors = (figures.logits - plain.logits).abs()
    return {
        "perplexity": round(figures.perplexity, 4),
        "against bfloat16": f"{100 * (figures.perplexity / plain.perplexity - 1):+.2f} %",
        "mean logit error": round(errors.mean().item(), 4),
        "max logit error": round(errors.max().item(), 3),
        "same greedy token": round(
            (figures.logits.argmax(1) == plain.logits.argmax(1)).float().mean().item(), 4
        ),
        "weights in memory": f"{figures.weights_bytes / 1e6:.1f} MB",
        "quantization": figures.quantization,
    }


def compare(model: Path, ids: Tensor) -> dict[str, dict[str, object]]:
    """A row of figures for each form, beside bfloat16 and an int8 cache."""
    plain = measure(model, ids)
    rows = {"bfloat16": _row(plain, plain)}
    rows["kv_cache_dtype int8"] = _row(measure(model, ids, kv_cache_dtype="int8"), plain)
    with tempfile.TemporaryDirectory() as folder:
        for form in MEASURED:
            rows[form] = _row(measure(write(form, model, Path(folder) / form), ids), plain)
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("write", "perplexity"))
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--form", choices=(*FORMS, *TYPES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000, help="of the held-out book; 0 means all")
    arguments = parser.parse_args()
    if arguments.command == "write":
        print(write(arguments.form, arguments.model, arguments.out))
        return
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    ids = torch.from_numpy(encode_held_out(tokenizer, arguments.corpus)).long()
    ids = ids[: arguments.tokens] if arguments.tokens else ids
    torch.set_num_threads(1)
    rows = compare(arguments.model, ids)
    command = f"python -m tools.quantized perplexity --corpus CORPUS --tokens {arguments.tokens}"
    print(json.dumps({"command": command, **environment(), "tokens": len(ids), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
