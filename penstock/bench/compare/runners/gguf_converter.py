"""llama.cpp's own converter on a checkpoint whose tokenizer it has not met. Runs under a peer's Python.

usage: gguf_converter.py LLAMA_CPP_FOLDER MODEL_FOLDER OUT.gguf

Its check of the pre-tokenizer's fingerprint is answered with that of the architecture's usual tokenizer; the
weights are converted as always, in bfloat16. Prompts are token ids, so the tokenizer plays no part.
"""

import json
import runpy
import sys
from pathlib import Path

PRE_TOKENIZERS = {"llama": "llama-bpe", "mistral": "llama-bpe"}


def main() -> None:
    """Patch the check, then run the script as it is."""
    root, model, target = (Path(word) for word in sys.argv[1:4])
    sys.path[:0] = [str(root), str(root / "gguf-py")]
    kind = json.loads((model / "config.json").read_text())["model_type"]
    from conversion import base  # type: ignore[import-not-found]  # llama.cpp's, found on the path set above

    base.TextModel.get_vocab_base_pre = lambda _self, _tokenizer: PRE_TOKENIZERS.get(kind, "qwen2")
    script = root / "convert_hf_to_gguf.py"
    sys.argv = [str(script), str(model), "--outfile", str(target), "--outtype", "bf16"]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
