"""Models whose products of one input are one, as the Triton home has them, beside the same with all apart."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from penstock.engine.runner.stored_weights import StoredWeights, tensors_in
from penstock.kernels import ops
from penstock.kernels.adapters import AdapterWeights, LowRankPair
from penstock.kernels.ops import LinearWeight
from penstock.kernels.options import KernelOptions
from penstock.kernels.quantization import Method, Quantization
from penstock.kernels.triton.kernel_set import TritonKernels
from penstock.layers.linear import JoinedLinears, SeparateLinears
from penstock.models.interface import LoadedModel
from penstock.models.llama import LlamaBlock, LlamaForCausalLM
from penstock.models.loader import load_model
from penstock.parallel.rank import ALONE, Rank
from tests.oracle.checkpoints import tiny_model
from tests.oracle.paged_driver import PagedDriver

TOLERANCE = 2e-5
"""Logits are of order 1 to 10; sums of float32 in another order, since a joined product is cut otherwise."""
STEPS = ([("a", [3, 14]), ("b", [6])], [("a", [35])])
"""A prompt beside another, then a decode alone, which has kernels of its own."""


def checkpoint(family: str, path: Path) -> Path:
    """Of one layer: the others would only repeat it."""
    kinds = {"layer_types": ["full_attention"]} if family == "qwen3" else {}
    tiny_model(family, vocab_size=40, num_hidden_layers=1, **kinds).save_pretrained(path)
    return path


class ApartKernels(TritonKernels):
    """The same home, with each product by itself."""

    def join_linears(self, apart: Sequence[LinearWeight]) -> LinearWeight | None:
        del apart
        return None


def load(
    path: Path, kernels: type[TritonKernels] = TritonKernels, *, rank: Rank = ALONE, **options: object
) -> LoadedModel:
    made = KernelOptions(**options)  # type: ignore[arg-type]  # as the tests write them
    return load_model(path, dtype="float32", kernel_set=kernels(made), options=made, rank=rank)


def logits(loaded: LoadedModel, adapters: dict[str, AdapterWeights] | None = None) -> Tensor:
    driver = PagedDriver(loaded)
    driver.adapters = adapters or {}
    return torch.cat([each for step in STEPS for each in driver.step(step).values()])


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=TOLERANCE)


def first_block(loaded: LoadedModel) -> LlamaBlock:
    assert isinstance(loaded.model, LlamaForCausalLM)
    return loaded.model.blocks[0]


def reached_bytes(loaded: LoadedModel) -> int:
    """Of all tensors of the model but the rotation's frequencies, which follow from the config."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in tensors_in(loaded.model)}
    del tensors[loaded.model.rope._frequencies.data_ptr()]  # type: ignore[attr-defined]  # of two families
    return sum(tensors.values())


@pytest.mark.parametrize("family", ["llama-all-biases", "qwen3"])
def test_logits_are_those_of_separate_products(family: str, tmp_path: Path) -> None:
    """With biases, and with heads that are normed where they lie; no byte is kept or counted twice."""
    path = checkpoint(family, tmp_path)
    joined, apart = load(path), load(path, ApartKernels)
    assert joined.weights_bytes == apart.weights_bytes == reached_bytes(joined)
    for loaded, kind in ((joined, JoinedLinears), (apart, SeparateLinears)):
        block = loaded.model.blocks[0]  # type: ignore[attr-defined]  # of two families
        assert isinstance(block.attention.query_key_value, kind)
        assert isinstance(block.mlp.gate_up, kind)
    same(logits(joined), logits(apart))


@pytest.mark.parametrize("method", ["int8", "int4", "fp8"])
def test_weights_that_are_rounded_at_start_are_joined_too(method: Method, tmp_path: Path) -> None:
    rule = Quantization(method=method, group_size=32, activations="bf16")
    path = checkpoint("llama-all-biases" if method == "int8" else "llama", tmp_path)
    joined, apart = (load(path, kernels, quantization=rule) for kernels in (TritonKernels, ApartKernels))
    assert joined.weights_bytes == apart.weights_bytes == reached_bytes(joined)
    assert isinstance(first_block(joined).mlp.gate_up, JoinedLinears)
    same(logits(joined), logits(apart))


def adapter_for(loaded: LoadedModel, modules: Sequence[str]) -> AdapterWeights:
    """Random matrices for the modules of these names in every layer."""
    assert loaded.sites is not None
    pairs = {
        site.index: LowRankPair(
            a=torch.randn(3, site.in_features, generator=torch.Generator().manual_seed(site.index)) / 4,
            b=torch.randn(site.out_features, 3, generator=torch.Generator().manual_seed(site.index + 1)) / 4,
            scale=1.0,
        )
        for site in loaded.sites.sites
        if site.name.endswith(tuple(modules))
    }
    return ops.prepare_adapter(loaded.kernels, pairs, num_sites=len(loaded.sites.sites), dtype=torch.float32)


def test_adapters_act_on_their_part_of_the_product(tmp_path: Path) -> None:
    """One on keys and up, one on the others; where they act, the answer is another."""
    path = checkpoint("llama", tmp_path)
    joined, apart = (load(path, kernels, enable_lora=True) for kernels in (TritonKernels, ApartKernels))
    modules = {"a": ("k_proj", "up_proj"), "b": ("q_proj", "v_proj", "gate_proj")}
    got, expected = (
        logits(loaded, {name: adapter_for(loaded, each) for name, each in modules.items()})
        for loaded in (joined, apart)
    )
    same(got, expected)
    assert (got - logits(joined)).abs().amax(dim=1).min() > 100 * TOLERANCE


def test_each_of_two_ranks_joins_its_part_of_each(tmp_path: Path) -> None:
    """Not a part of the join: heads of query, key and value follow each other on every rank."""
    path = checkpoint("llama-all-biases", tmp_path)
    one = first_block(load(path))
    ranks = [first_block(load(path, rank=Rank(index=index, size=2))) for index in range(2)]
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    for whole, parts in (
        (one.attention.query_key_value(x), [each.attention.query_key_value(x) for each in ranks]),
        (one.mlp.gate_up(x), [each.mlp.gate_up(x) for each in ranks]),
    ):
        for expected, *halves in zip(whole, *parts, strict=True):
            same(torch.cat(halves, dim=1), expected)


def test_joined_weights_are_put_aside_and_brought_back(tmp_path: Path) -> None:
    """As while the engine sleeps: once each, and the parts that they were made of are gone."""
    loaded = load(checkpoint("llama", tmp_path))
    assert isinstance(loaded.model, LlamaForCausalLM)
    before = logits(loaded)
    own = {
        tensor.data_ptr(): tensor
        for block in loaded.model.blocks
        for linears in (block.attention.query_key_value, block.mlp.gate_up)
        for tensor in tensors_in(linears)
    }
    stored = StoredWeights(loaded.model, lies_on_device=lambda tensor: tensor.data_ptr() in own)
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in own.values())
    assert num_bytes == 4 * 48 * (4 * 16 + 2 * 2 * 16 + 2 * 56)
    stored.put_aside()
    assert stored.num_bytes == num_bytes
    assert not any(tensor.untyped_storage().nbytes() for tensor in own.values())
    stored.bring_back()
    assert torch.equal(logits(loaded), before)


def test_a_decode_is_ten_launches_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside embedding, angles and the last norm."""
    loaded = load(checkpoint("llama", tmp_path))
    driver = PagedDriver(loaded)
    driver.step([("a", [3, 14])])
    batch = driver._batch([("a", [5])])
    launched: Counter[str] = Counter()
    launch = InterpretedFunction.run

    def count(kernel: InterpretedFunction, *args: object, **options: object) -> None:
        launched[kernel.fn.__name__] += 1
        launch(kernel, *args, **options)

    monkeypatch.setattr(InterpretedFunction, "run", count)
    with torch.inference_mode():
        loaded.model.forward(batch)
    assert launched == {
        "_embedding_kernel": 1,
        "_angles_kernel": 1,
        "_rms_norm_kernel": 2 + 1,
        "row_kernel": 4,
        "_rope_kernel": 1,
        "write_kernel": 1,
        "short_kernel": 1,
        "_activation_kernel": 1,
    }
