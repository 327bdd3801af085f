"""The layers pass their parameters to the operations they stand for."""

import pytest
import torch

from penstock.kernels import ops
from penstock.kernels.ops import AttentionShape
from penstock.kernels.registry import select_kernels
from penstock.layers.attention import PagedAttention
from penstock.layers.embedding import Embedding, LmHead
from penstock.layers.linear import JoinedLinears, Linear, SeparateLinears
from penstock.layers.mlp import Activation, GatedMlp
from penstock.layers.norm import RmsNorm
from tests.unit.kernels.attention_case import make_case

KERNELS = select_kernels("eager", device="cpu", dtype=torch.float32)


def linear(rows: list[list[float]]) -> Linear:
    return Linear(kernels=KERNELS, weight=ops.prepare_linear(KERNELS, torch.tensor(rows)))


@pytest.mark.parametrize("activation", list(Activation))
def test_fused_gate_and_up_are_the_two_halves_of_one_weight_gate_first(activation: Activation) -> None:
    gate, up, down = [[1.0, 2.0]], [[0.5, -1.0]], [[2.0], [3.0]]
    x = torch.tensor([[0.3, -0.2], [1.0, 1.0]])
    apart = SeparateLinears(linears=(linear(gate), linear(up)))
    joined = JoinedLinears(product=linear([*gate, *up]), sizes=[1, 1], sites=(None, None))
    first, second = (
        GatedMlp(gate_up=each, down=linear(down), activation=activation)(x) for each in (apart, joined)
    )
    assert torch.allclose(first, second)


def test_a_norm_takes_the_sum_with_what_the_block_before_adds() -> None:
    """Before the first block there is nothing to add."""
    norm = RmsNorm(kernels=KERNELS, weight=torch.tensor([1.0, 2.0]), eps=1e-5)
    stream, added = torch.tensor([[3.0, -1.0]]), torch.tensor([[0.5, 0.25]])
    for given, total in ((added, stream + added), (None, stream)):
        normed, summed = norm.add(given, stream)
        assert torch.equal(summed, total)
        assert torch.equal(normed, norm(total))


def test_the_three_activations_differ() -> None:
    gate, up = torch.tensor([[0.7]]), torch.tensor([[1.0]])
    assert len({float(activation.gated(KERNELS, gate, up)) for activation in Activation}) == 3


def test_a_scaled_embedding_rounds_its_factor_to_the_weights_dtype() -> None:
    """55.4256 becomes 55.5 in bfloat16, as it was when the model was trained."""
    table = Embedding(kernels=KERNELS, weight=torch.ones(2, 1, dtype=torch.bfloat16))
    assert table.scaled(torch.tensor([1]), 3072**0.5).item() == 55.5


def test_capped_logits_stay_within_the_cap_and_are_float32() -> None:
    weight = ops.prepare_linear(KERNELS, torch.tensor([[100.0], [0.0]], dtype=torch.bfloat16))
    head = LmHead(kernels=KERNELS, weight=weight, softcap=30.0)
    logits = head(torch.ones(1, 1, dtype=torch.bfloat16))
    assert logits.dtype == torch.float32
    assert logits[0].tolist() == pytest.approx([30 * torch.tanh(torch.tensor(100 / 30)).item(), 0.0])


def test_attention_writes_before_it_reads() -> None:
    """A token sees its own key and value of this step."""
    from penstock.kernels.batch import ForwardBatch

    case = make_case([(3, 3)], kernels=KERNELS)
    case.slab.keys[case.batch.block_tables[0, 0]] = 0
    batch = ForwardBatch(
        token_ids=torch.zeros(3, dtype=torch.int64),
        positions=torch.arange(3),
        groups=(case.batch,),
        layer_groups=(0,),
        layer_slabs=(case.slab,),
    )
    layer = PagedAttention(kernels=KERNELS, layer_idx=0, shape=AttentionShape(scale=case.shape.scale))
    got = layer(case.query, case.new_keys, case.new_values, batch)
    assert got.shape == (3, 32)
    torch.testing.assert_close(got.double(), case.expected.flatten(1), atol=1e-5, rtol=1e-5)
