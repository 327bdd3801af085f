"""Adapters through the whole engine give the greedy tokens of weights that `peft` has merged."""

from pathlib import Path

import pytest

from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, LoraConfig, LoraModule, SchedulerConfig
from penstock.engine.core import EngineCore
from tests.oracle.checkpoints import FAMILIES, tiny_checkpoint
from tests.oracle.lora_adapters import (
    LINEARS,
    LLAMA_LINEARS,
    AdapterSpec,
    greedy,
    load_base,
    merged,
    save_adapter,
)

VOCAB = 101
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43]
MAX_TOKENS = 8


def build(path: Path, adapters: dict[str, Path], *, kernels: str = "reference", **lora: int) -> EngineCore:
    modules = tuple(LoraModule(name=name, path=str(folder)) for name, folder in adapters.items())
    config = EngineConfig(
        model_path=str(path),
        dtype="float32",
        kernels=kernels,
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=9),
        kv=KvConfig(block_size=4, num_blocks=96),
        lora=LoraConfig(enable_lora=True, modules=modules, **lora),
        max_model_len=48,
        warmup=False,
    )
    return build_core(config)


def ask(core: EngineCore, name: str, *, request_id: str = "", prompt: list[int] = PROMPT) -> None:
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    core.add(
        EngineRequest(
            request_id=RequestId(request_id or name or "base"),
            prompt_token_ids=list(prompt),
            params=params,
            adapter=name,
        )
    )


def answers(core: EngineCore) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    while core.has_work:
        for delta in core.step().deltas:
            assert delta.error is None, delta.error
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_and_base_in_one_batch_equal_merged_weights(family: str, tmp_path: Path) -> None:
    base = tiny_checkpoint(family, tmp_path / "base", vocab_size=VOCAB)
    targets = LINEARS.get(family, LLAMA_LINEARS)
    specs = {
        "all": AdapterSpec(seed=1, targets=targets),
        "some": AdapterSpec(seed=2, rank=3, alpha=40.0, targets=targets[:2], rslora=True),
    }
    folders = {name: save_adapter(base, tmp_path / name, spec) for name, spec in specs.items()}
    core = build(base, folders)
    for name in ("all", "", "some"):
        ask(core, name)
    expected = {
        name: greedy(merged(base, spec), PROMPT, num_tokens=MAX_TOKENS) for name, spec in specs.items()
    }
    expected["base"] = greedy(load_base(base), PROMPT, num_tokens=MAX_TOKENS)
    assert expected["all"] != expected["base"], "the adapter changes nothing"
    assert answers(core) == expected
