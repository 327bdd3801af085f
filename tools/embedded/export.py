"""Writes a training checkpoint as a model folder that `transformers` loads as it is."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tools.embedded.checkpoint import read
from tools.embedded.tokenizer import BOS, EOS, PAD, SPECIALS, TURN_END

PACKAGE_BYTES_MAX = 20_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def model_config(sizes: dict[str, Any]) -> dict[str, Any]:
    """The contents of `config.json`. Any: a JSON document."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": SPECIALS.index(BOS),
        "eos_token_id": [SPECIALS.index(TURN_END), SPECIALS.index(EOS)],
        "pad_token_id": SPECIALS.index(PAD),
    }


def generation_config(config: dict[str, Any]) -> dict[str, Any]:
    """The contents of `generation_config.json`. Any: a JSON document."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names} | {"do_sample": False}


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def export(checkpoint: Path, tokenizer_dir: Path, output: Path) -> int:
    """Write the folder and return its size in bytes; the weights are rounded to bfloat16."""
    saved = read(checkpoint)
    config = model_config(saved.config)
    output.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.bfloat16().contiguous() for name, weight in saved.weights.items()}
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    (output / "model.safetensors").chmod(0o644)
    _write_json(output / "config.json", config)
    _write_json(output / "generation_config.json", generation_config(config))
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_dir / name, output / name)
    num_bytes = sum(path.stat().st_size for path in output.iterdir())
    if num_bytes > PACKAGE_BYTES_MAX:
        raise ValueError(f"{output}: {num_bytes} bytes, at most {PACKAGE_BYTES_MAX} are allowed")
    return num_bytes


def main() -> None:
    """Export from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("penstock/models/embedded"))
    arguments = parser.parse_args()
    num_bytes = export(arguments.checkpoint, arguments.tokenizer, arguments.output)
    print(f"{arguments.output}: {num_bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
