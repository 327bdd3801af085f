"""From plan to tensors: exact values by hand."""

import pytest
import torch
from fake_model import make_runner

from penstock.engine.kv.cache_groups import make_cache_layout
from penstock.engine.runner.input_batch import InputBatchBuilder
from penstock.engine.runner.kv_pool import KvPool
from penstock.engine.scheduler.plan import SampleSpec, ScheduledSequence, StepPlan
from penstock.kernels.batch import KvShape
from penstock.kernels.reference.kernel_set import ReferenceKernels


def builder(*windows, block_size=4):
    layout = make_cache_layout(windows or (None,))
    shape = KvShape(block_size=block_size, num_kv_heads=1, head_dim=2, dtype=torch.float32)
    block = ReferenceKernels().kv_block(shape)
    pool = KvPool(layout, num_blocks=16, shape=shape, block=block)
    return InputBatchBuilder(layout, pool=pool)


def scheduled(seq_id, token_ids, start, *tables):
    return ScheduledSequence(seq_id, token_ids, start, tables, (SampleSpec(seq_id, 0),))


def test_the_worked_example_of_the_batch_contract():
    batch = builder().build([scheduled(1, [104, 105, 106], 4, [5, 2]), scheduled(2, [209], 9, [7, 1, 3])])
    (group,) = batch.groups
    assert batch.token_ids.tolist() == [104, 105, 106, 209]
    assert batch.positions.tolist() == [4, 5, 6, 9]
    assert group.query_start_loc.tolist() == [0, 3, 4]
    assert group.seq_lens.tolist() == [7, 10]
    assert group.block_tables.tolist() == [[5, 2, -1], [7, 1, 3]]
    assert group.slot_mapping.tolist() == [8, 9, 10, 13]
    assert (group.query_lens_host, group.seq_lens_host) == ((3, 1), (7, 10))


def test_dtypes_are_those_of_the_contract():
    batch = builder().build([scheduled(1, [1], 0, [0])])
    (group,) = batch.groups
    names = [str(t.dtype) for t in (batch.token_ids, batch.positions, group.slot_mapping)]
    assert names == ["torch.int64"] * 3
    names = [str(t.dtype) for t in (group.query_start_loc, group.seq_lens, group.block_tables)]
    assert names == ["torch.int32"] * 3


def test_each_group_has_its_own_table_and_freed_blocks_behind_a_window_stay_minus_one():
    batch = builder(None, 4).build([scheduled(1, [7, 7], 11, [3, 4, 5, 6], [-1, -1, 8, 9])])
    full, window = batch.groups
    assert full.block_tables.tolist() == [[3, 4, 5, 6]]
    assert window.block_tables.tolist() == [[-1, -1, 8, 9]]
    assert full.slot_mapping.tolist() == [5 * 4 + 3, 6 * 4]
    assert window.slot_mapping.tolist() == [8 * 4 + 3, 9 * 4]


def shown(batch):
    """Block tables without the columns that are -1 for everybody, of which there may be any number."""
    tables = batch.groups[0].block_tables
    used = (tables != -1).any(dim=0).nonzero()
    return tables[:, : int(used.max()) + 1].tolist()


def test_blocks_beyond_the_last_token_are_not_shown():
    batch = builder().build([scheduled(1, [7], 3, [3, 4, 5])])
    assert shown(batch) == [[3]]


def test_tables_that_the_scheduler_changes_between_steps_are_read_anew():
    """Tables are handed over by reference: grown, rewritten in place, freed behind a window."""
    build = builder(None).build
    table = [3, 4]
    assert shown(build([scheduled(1, [7], 7, table)])) == [[3, 4]]
    table.append(5)
    assert shown(build([scheduled(1, [7], 8, table)])) == [[3, 4, 5]]
    table[2] = 9
    assert shown(build([scheduled(1, [7], 8, table)])) == [[3, 4, 9]]
    table[0] = -1
    assert shown(build([scheduled(1, [7], 8, table)])) == [[-1, 4, 9]]


def test_a_built_batch_does_not_change_when_the_scheduler_goes_on():
    table = [3, 4]
    tokens = [7]
    batch = builder().build([ScheduledSequence(1, tokens, 5, (table,))])
    table[1], tokens[0] = 0, 0
    assert shown(batch) == [[3, 4]]
    assert batch.token_ids.tolist() == [7]


@pytest.mark.parametrize("token_ids", [[1], [1, 2]], ids=["decodes", "chunks"])
def test_tables_are_kept_of_the_latest_step_only(token_ids):
    fresh, used = builder(), builder()
    used.build([scheduled(i, token_ids, 0, [i]) for i in range(9)])
    for inputs in (fresh, used):
        inputs.build([scheduled(3, token_ids, 0, [3])])
    assert used.buffer_bytes == fresh.buffer_bytes > 0


def test_decodes_that_change_places_bring_their_tables():
    inputs = builder()
    one, other = scheduled(1, [7], 7, [3, 4]), scheduled(2, [8], 3, [5])
    assert shown(inputs.build([one, other])) == [[3, 4], [5, -1]]
    assert shown(inputs.build([other, one])) == [[5, -1], [3, 4]]


def test_writing_to_a_block_that_is_not_owned_is_our_bug():
    with pytest.raises(AssertionError, match="does not own"):
        builder().build([scheduled(1, [7], 5, [3, -1])])


def test_layers_of_a_group_use_its_table_and_their_own_slab():
    """Gemma's pattern in small: layers 0, 1, 3, 4 slide, 2 and 5 do not; two slabs."""
    runner, model = make_runner(layer_windows=(8, 8, None, 8, 8, None))
    tables = ([0], [1], [2])
    runner.launch(StepPlan(step_id=0, sequences=[scheduled(1, [5], 0, *tables)]))
    (batch,) = model.batches
    assert batch.layer_groups == (1, 1, 0, 2, 2, 0)
    first, second = batch.layer_slabs[0].keys, batch.layer_slabs[1].keys
    slabs = [slab.keys.data_ptr() for slab in batch.layer_slabs]
    assert slabs == [x.data_ptr() for x in (first, second, first, first, second, second)]
    assert [first[block, 0, 0, 0].item() for block in (0, 1, 2)] == [6, 6, 6]


def test_a_step_of_decodes_is_arranged_as_beside_a_prefill():
    """Decodes alone take a shorter way; the numbers are the same."""
    decodes = [
        scheduled(i, [10 + i], start, list(range(3 * i, 3 * i + 3))) for i, start in enumerate((0, 9, 4))
    ]
    alone = builder().build(decodes)
    beside = builder().build([*decodes, scheduled(9, [7, 8], 0, [9])])
    assert alone.token_ids.tolist() == beside.token_ids.tolist()[:3] == [10, 11, 12]
    assert alone.positions.tolist() == beside.positions.tolist()[:3] == [0, 9, 4]
    (group,), (other,) = alone.groups, beside.groups
    assert shown(alone) == shown(beside)[:3]
    for name, length in (("query_start_loc", 4), ("seq_lens", 3), ("slot_mapping", 3)):
        got, expected = getattr(group, name), getattr(other, name)[:length]
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected), name
    assert group.query_lens_host == (1, 1, 1)
    assert group.seq_lens_host == (1, 10, 5)


def test_a_decode_that_is_written_to_a_block_that_is_not_owned_is_our_bug():
    with pytest.raises(AssertionError, match="does not own"):
        builder().build([scheduled(1, [7], 5, [3, -1])])
