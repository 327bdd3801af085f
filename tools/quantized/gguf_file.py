"""From a checkpoint folder to a GGUF file, as llama.cpp's converter writes it; names are `gguf`'s.

It serves tests and the table of perplexities: families of the model registry, byte-level tokenizers.
"""

import json
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt
from torch import Tensor

from tools.quantized.checkpoint import TRANSPOSED, read_tensors
from tools.quantized.ggml_blocks import quantize, type_for

ARCHITECTURES: Final = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
    "GPT2LMHeadModel": "gpt2",
}
TYPES: Final = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K")
EMBEDDING_TYPE: Final = "Q8_0"
"""Of the embedding in files of fewer bits."""
CONTROL, USER_DEFINED, NORMAL = 3, 4, 1
Fields = dict[str, Any]  # of a config.json


def _interleaved(weight: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    # Rows of a head: first, middle, second, the one after the middle, ...
    split = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def _changed(name: str, values: npt.NDArray[Any], config: Fields, arch: str) -> npt.NDArray[Any]:
    if arch == "llama" and ".q_proj." in name:
        return _interleaved(values, config["num_attention_heads"])
    if arch == "llama" and ".k_proj." in name:
        return _interleaved(values, config.get("num_key_value_heads") or config["num_attention_heads"])
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    return values.T.copy() if TRANSPOSED.search(name) else values


def _joined_experts(tensors: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Experts' matrices as one tensor each; all other tensors as they are."""
    joined: dict[str, list[npt.NDArray[Any]]] = {}
    plain: dict[str, npt.NDArray[Any]] = {}
    for name, values in tensors.items():
        head, found, tail = name.partition(".experts.")
        if not found:
            plain[name] = values
            continue
        number, _, leaf = tail.partition(".")
        parts = joined.setdefault(f"{head}.experts.{leaf}", [])
        assert len(parts) <= int(number), "experts come in their order"
        parts.append(values)
    return plain | {name: np.stack(parts) for name, parts in joined.items()}


def _by_number(name: str) -> list[Any]:  # words and numbers, as sort takes them
    return [int(part) if part.isdigit() else part for part in name.split(".")]


def gguf_tensors(tensors: dict[str, Tensor], config: Fields) -> dict[str, npt.NDArray[Any]]:
    """The converter's tensors, float32, by their names in a file."""
    arch = ARCHITECTURES[config["architectures"][0]]
    num_blocks = config.get("num_hidden_layers") or config["n_layer"]
    names = gguf.get_tensor_name_map(_arch_number(arch), num_blocks)
    ordered = {name: tensors[name].float().numpy() for name in sorted(tensors, key=_by_number)}
    found: dict[str, npt.NDArray[Any]] = {}
    for name, values in _joined_experts(ordered).items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings", arch == "gpt2"):
            continue
        given = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert given is not None, name
        found[given] = np.ascontiguousarray(_changed(name, values, config, arch))
    return found


def _arch_number(arch: str) -> gguf.MODEL_ARCH:
    return next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)


def _add_config(writer: gguf.GGUFWriter, config: Fields, arch: str) -> None:
    get = config.get
    heads = get("num_attention_heads") or config["n_head"]
    hidden = get("hidden_size") or config["n_embd"]
    writer.add_context_length(get("max_position_embeddings") or config["n_positions"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(get("num_hidden_layers") or config["n_layer"])
    writer.add_feed_forward_length(get("intermediate_size") or get("n_inner") or 4 * hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(get("num_key_value_heads") or heads)
    if arch == "gpt2":
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    head_dim = get("head_dim") or hidden // heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * (_rope(config).get("partial_rotary_factor") or 1)))
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta") or get("rope_theta") or 10_000))
    if get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if get("num_local_experts") or get("num_experts"):
        writer.add_expert_count(get("num_local_experts") or config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _rope(config: Fields) -> Fields:
    found: Fields = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return found.get("full_attention") or found


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: Fields, pre: str) -> None:
    if not (folder / "tokenizer.json").exists():
        return
    fields = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {entry["id"]: entry for entry in fields["added_tokens"]}
    by_id = {number: token for token, number in fields["model"]["vocab"].items()}
    by_id |= {number: entry["content"] for number, entry in added.items()}
    tokens = [by_id[number] for number in range(len(by_id))]
    kinds = [
        NORMAL if i not in added else CONTROL if added[i]["special"] else USER_DEFINED
        for i in range(len(tokens))
    ]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in fields["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if merges:
        writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    ids = {token: number for number, token in enumerate(tokens)}
    for name, add in (("bos_token", writer.add_bos_token_id), ("pad_token", writer.add_pad_token_id)):
        if name in settings:
            add(ids[settings[name]])
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    if "chat_template" in settings:
        writer.add_chat_template(settings["chat_template"])


def _stored_type(name: str, shape: tuple[int, ...], kind: str) -> str:
    is_matrix = len(shape) > 1 and name.endswith(".weight") and "_inp" not in name
    if not is_matrix:
        return "F32"
    is_embedding = name in {"token_embd.weight", "output.weight", "position_embd.weight"}
    wanted = EMBEDDING_TYPE if is_embedding and kind.startswith("Q") else kind
    return type_for(wanted, shape[-1])


def write_gguf(source: Path, target: Path, *, kind: str, pre: str = "default") -> dict[str, npt.NDArray[Any]]:
    """Write a GGUF file.

    Args:
        source: a plain checkpoint folder.
        target: the file.
        kind: a type of `TYPES`, for matrices; embeddings and head of `Q` types are Q8_0, the rest float32.
        pre: name of the pattern that cuts texts.

    Returns:
        What the matrices stand for in the file's own layout, by their names there.
    """
    config = json.loads((source / "config.json").read_text())
    arch = ARCHITECTURES[config["architectures"][0]]
    target.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(target, arch)
    _add_config(writer, config, arch)
    _add_tokenizer(writer, source, config, pre)
    meant: dict[str, npt.NDArray[Any]] = {}
    for name, values in gguf_tensors(read_tensors(source), config).items():
        stored = _stored_type(name, values.shape, kind)
        number = gguf.GGMLQuantizationType[stored]
        raw = quantize(values, stored)
        writer.add_tensor(name, raw, raw_dtype=number)
        meant[name] = gguf.quants.dequantize(raw, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant
