"""Parts of all ranks make up the whole, each thing once; what cannot be shared is refused by name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import StartupError
from penstock.parallel.rank import ALONE, Rank
from tests.fakes.thread_ranks import run_ranks

sizes = st.integers(1, 5)


@given(size=sizes, shares=st.lists(st.integers(1, 4), min_size=1, max_size=3), dim=st.integers(0, 1))
def test_the_cuts_of_all_ranks_are_a_partition_of_every_piece(size: int, shares: list[int], dim: int) -> None:
    pieces = [share * size for share in shares]
    whole = torch.arange(sum(pieces) * 3).view(sum(pieces), 3)
    whole = whole if dim == 0 else whole.t()
    cuts = [Rank(index=i, size=size).cut(pieces, dim=dim, of="x") for i in range(size)]
    parts = [whole if cut is None else cut.of(whole) for cut in cuts]
    assert all(part.shape[dim] == sum(shares) for part in parts)
    # The k-th piece of every rank beside each other is the k-th piece.
    offset = 0
    for share, piece in zip(shares, whole.split(pieces, dim=dim), strict=True):
        mine = [part.narrow(dim, offset, share) for part in parts]
        assert torch.equal(torch.cat(mine, dim=dim), piece)
        offset += share


@given(size=sizes, total=st.integers(25, 60))
def test_the_rows_of_all_ranks_are_the_vocabulary(size: int, total: int) -> None:
    ranges = [Rank(index=i, size=size).rows(total) for i in range(size)]
    assert [row for start, end in ranges for row in range(start, end)] == list(range(total))
    assert all(end > start for start, end in ranges)


def test_what_cannot_be_shared_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        StartupError, match="tensor_parallel_size is 2, it must divide num_key_value_heads, which is 3"
    ):
        Rank(size=2).share(3, of="num_key_value_heads")
    with pytest.raises(StartupError, match="too many for a vocabulary of 9"):
        Rank(size=4).rows(9)


def test_a_rank_that_is_alone_takes_all_and_waits_for_nobody() -> None:
    x = torch.randn(2, 5)
    assert ALONE.cut((3, 4), dim=0, of="x") is None
    assert ALONE.sum(x) is x
    assert ALONE.join(x, total=5) is x


@pytest.mark.parametrize("total", [7, 8, 9])
def test_joined_columns_are_those_of_all_ranks_in_their_order(total: int) -> None:
    whole = torch.randn(3, total)

    def work(rank: Rank) -> None:
        start, end = rank.rows(total)
        assert torch.equal(rank.join(whole[:, start:end], total=total), whole)

    run_ranks(work, size=3)


def test_the_sum_is_the_same_on_every_rank() -> None:
    def work(rank: Rank) -> None:
        x = torch.full((2,), float(rank.index + 1), dtype=torch.bfloat16)
        assert torch.equal(rank.sum(x), torch.full((2,), 6.0, dtype=torch.bfloat16))

    run_ranks(work, size=3)
