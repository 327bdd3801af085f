"""The bound of a workload: sums that can be done by hand."""

import pytest

from penstock.bench.compare.bound import ModelSize, least_seconds, read_model_size
from penstock.bench.machine_limits import MachineLimits
from penstock.bench.model_cost import ModelCost
from penstock.bench.workload import from_lists
from penstock.core.errors import CheckpointError
from penstock.models.embedded_model import embedded_path
from penstock.models.loader import load_model
from tests.oracle.checkpoints import tiny_checkpoint

SIZE = ModelSize(cost=ModelCost(body_flops=2_000, head_flops=400), kv_numbers=0, attention_flops=0)
"""1,000 weights in the layers and 200 in the head: 2,400 bytes in bf16."""


def limits(*, read_gb_per_s: float = 1e-6, tflops: float = 1e3) -> MachineLimits:
    return MachineLimits(
        read_gb_per_s=read_gb_per_s, bf16_tflops=tflops, int8_tops=tflops, isa="x", method="m", num_threads=2
    )


def test_a_stream_reads_the_weights_once_a_token():
    load = from_lists([[1, 2, 3]], output_lens=[5])
    assert least_seconds(load, size=SIZE, precision="bf16", limits=limits()) == pytest.approx(5 * 2.4)
    assert least_seconds(load, size=SIZE, precision="int8", limits=limits()) == pytest.approx(5 * 1.2)


def test_what_multiplies_more_than_it_reads_lasts_as_long_as_half_the_peak_allows():
    """100 tokens of a prompt, one of them drawn: 200,400 operations at half of 1e6 a second."""
    load = from_lists([list(range(100))], output_lens=[1])
    slow = limits(read_gb_per_s=1e6, tflops=1e-6)
    assert least_seconds(load, size=SIZE, precision="bf16", limits=slow) == pytest.approx(200_400 / 5e5)


def test_users_of_a_closed_loop_wait_for_a_place():
    load = from_lists([[1], [2], [3], [4]], output_lens=[3] * 4, max_concurrency=2)
    assert least_seconds(load, size=SIZE, precision="bf16", limits=limits()) == pytest.approx(2 * 3 * 2.4)


def test_a_shared_beginning_is_computed_once():
    slow = limits(read_gb_per_s=1e6, tflops=1e-6)
    shared, other = list(range(32)), list(range(100, 132))
    alone = least_seconds(
        from_lists([[*shared, 50]], output_lens=[1]), size=SIZE, precision="bf16", limits=slow
    )
    both = from_lists([[*shared, 50], [*shared, 51]], output_lens=[1, 1])
    apart = from_lists([[*shared, 50], [*other, 51]], output_lens=[1, 1])
    assert least_seconds(apart, size=SIZE, precision="bf16", limits=slow) == pytest.approx(2 * alone)
    assert least_seconds(both, size=SIZE, precision="bf16", limits=slow) == pytest.approx(alone + 2_400 / 5e5)


def test_contexts_are_read_and_looked_at():
    size = ModelSize(cost=ModelCost(body_flops=0, head_flops=0), kv_numbers=50, attention_flops=10)
    load = from_lists([[1, 2, 3]], output_lens=[2])
    # The prompt reads nothing; the second token reads three earlier ones, 50 numbers of 2 bytes each.
    assert least_seconds(load, size=size, precision="bf16", limits=limits()) == pytest.approx(0.3)
    # The prompt's tokens look at 1 + 2 + 3, the second token at 4.
    slow = limits(read_gb_per_s=1e6, tflops=1e-6)
    assert least_seconds(load, size=size, precision="bf16", limits=slow) == pytest.approx(100 / 5e5)


def test_the_size_of_a_checkpoint_is_read(tmp_path):
    size = read_model_size(embedded_path())
    assert min(size.cost.body_flops, size.kv_numbers, size.attention_flops) > 0
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not say its size"):
        read_model_size(tmp_path)


def test_a_family_with_names_of_its_own_has_a_size_too(tmp_path):
    """GPT-2 says `n_layer`, `n_head` and `n_embd`."""
    folder = tiny_checkpoint("gpt2", tmp_path)
    shape = load_model(folder, kernels="reference").config.shape
    size = read_model_size(folder)
    assert size.kv_numbers == 2 * shape.num_layers * shape.hidden_size
    assert size.attention_flops == 4 * shape.num_layers * shape.hidden_size
