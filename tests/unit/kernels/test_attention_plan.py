"""How the eager home groups sequences: exact indices on tiny sizes, bounds on large ones."""

import pytest
import torch

from penstock.kernels.batch import AttentionBatch
from penstock.kernels.eager import attention_plan
from penstock.kernels.eager.attention import Workspace
from penstock.kernels.eager.attention_plan import Bucket, make_plan


def batch_of(lengths: list[tuple[int, int]], tables: list[list[int]] | None = None) -> AttentionBatch:
    width = max(-(-total // 4) for _, total in lengths)
    tables = tables or [[i * width + j for j in range(width)] for i in range(len(lengths))]
    return AttentionBatch(
        query_start_loc=torch.tensor([0, *(new for new, _ in lengths)]).cumsum(0).int(),
        seq_lens=torch.tensor([total for _, total in lengths], dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        slot_mapping=torch.zeros(sum(new for new, _ in lengths), dtype=torch.int64),
        query_lens_host=tuple(new for new, _ in lengths),
        seq_lens_host=tuple(total for _, total in lengths),
    )


def plan(batch: AttentionBatch, *, window: int | None = None, key_bytes: int = 64) -> tuple[Bucket, ...]:
    return make_plan(batch, block_size=4, window=window, dtype=torch.float32, key_bytes=key_bytes)


def test_decodes_share_a_bucket_and_pad_with_their_own_last_block() -> None:
    (bucket,) = plan(batch_of([(1, 9), (1, 3)], [[5, 2, 7], [4, -1, -1]]))
    assert bucket.rows.tolist() == [0, 1]
    assert bucket.block_ids.tolist() == [5, 2, 7, 4, 4, 4]
    assert bucket.keep is None
    assert bucket.bias is not None
    assert (bucket.bias == 0).flatten(1).sum(1).tolist() == [9, 3]


def test_a_whole_prompt_needs_no_mask() -> None:
    (bucket,) = plan(batch_of([(6, 6)]))
    assert (bucket.is_causal, bucket.bias, bucket.num_keys) == (True, None, 6)


def test_short_prompts_are_padded_to_one_call_and_only_real_rows_are_kept() -> None:
    (bucket,) = plan(batch_of([(2, 2), (3, 7)], [[1, -1], [3, 2]]))
    assert bucket.rows.tolist() == [2, 3, 4, 0, 1, 1]
    assert bucket.keep is not None
    assert bucket.keep.tolist() == [0, 1, 2, 3, 4]
    assert bucket.targets.tolist() == [2, 3, 4, 0, 1]
    assert bucket.block_ids.tolist() == [3, 2, 1, 1]


def test_a_window_gathers_only_the_blocks_in_sight() -> None:
    (bucket,) = plan(batch_of([(1, 14)], [[-1, -1, 6, 8]]), window=5)
    assert bucket.block_ids.tolist() == [6, 8]
    assert bucket.bias is not None
    assert (bucket.bias[0, 0, 0] == 0).tolist() == [False, True, True, True, True, True, False, False]


def test_sequences_of_unlike_length_get_buckets_of_their_own() -> None:
    buckets = plan(batch_of([(1, 4000), *[(1, 40)] * 30]))
    assert sorted(bucket.num_pieces for bucket in buckets) == [1, 30]


def test_a_bucket_gathers_no_more_than_its_limit() -> None:
    key_bytes = 4096
    for bucket in plan(batch_of([(1, 400)] * 12), key_bytes=key_bytes):
        assert bucket.block_ids.numel() * 4 * key_bytes <= attention_plan.MAX_BUCKET_BYTES


def test_masks_of_a_long_chunk_are_bounded_by_splitting_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "MAX_MASK_ELEMENTS", 64)
    buckets = plan(batch_of([(10, 20)]))
    assert sorted(row for bucket in buckets for row in bucket.targets.tolist()) == list(range(10))
    assert all(bucket.bias is not None and bucket.bias.numel() <= 64 for bucket in buckets)


def test_every_row_is_computed_once() -> None:
    buckets = plan(batch_of([(6, 6), (1, 17), (5, 21), (1, 3), (16, 40), (1, 64)]), window=7)
    assert sorted(row for bucket in buckets for row in bucket.targets.tolist()) == list(range(30))


def test_the_workspace_is_kept_and_grows() -> None:
    workspace, like = Workspace(), torch.zeros(9, 2, 3)
    first = workspace.take("keys", like=like, num_blocks=4)
    assert first.shape == (4, 2, 3)
    assert workspace.take("keys", like=like, num_blocks=2).data_ptr() == first.data_ptr()
    assert workspace.take("keys", like=like, num_blocks=5).shape == (5, 2, 3)
    assert workspace.take("keys", like=like.bfloat16(), num_blocks=1).dtype == torch.bfloat16
