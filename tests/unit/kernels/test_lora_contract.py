"""Every home adds each row's own adapter to a product, and leaves all other rows alone."""

import pytest
import torch
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.adapters import AdapterRows, LoraSite, LoraSites, LowRankPair
from penstock.kernels.options import DEFAULT_OPTIONS
from penstock.kernels.registry import HOMES
from tests.unit.kernels.device_home import on_test_device

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""As in the contract of the other operations: a few roundings of values of order 1."""
NUM_ROWS = 21
SIZES = ((40, 33), (96, 128), (64, 70))
"""(inputs, outputs) of the sites: ends inside a vector, inside a panel, and whole ones."""


@pytest.fixture(params=[(name, dtype) for name, home in HOMES.items() for dtype in home.dtypes], ids=str)
def home(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    return request.param


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def make_sites() -> LoraSites:
    sites = LoraSites()
    for idx, (in_features, out_features) in enumerate(SIZES):
        sites.add(f"module{idx}", in_features=in_features, out_features=out_features)
    return sites


def make_pair(site: LoraSite, *, rank: int, seed: int) -> LowRankPair:
    a = rand(rank, site.in_features, seed=seed).bfloat16().float()
    b = rand(site.out_features, rank, seed=seed + 1).bfloat16().float()
    return LowRankPair(a=a, b=b, scale=0.5 + 1 / rank)


@pytest.mark.parametrize("is_part", [False, True])
def test_each_row_gets_its_own_adapter_and_ranks_may_differ(
    home: tuple[str, torch.dtype], is_part: bool
) -> None:
    """Also where the product is some columns of a wider one, whose others stay as they are."""
    name, dtype = home
    made = HOMES[name].build(DEFAULT_OPTIONS)
    kernels, sites = on_test_device(made) if name == "triton" else made, make_sites()
    # Rows 0-2 use the first adapter, 3 none, 4-15 the second (more than a tile), 16 the third, the rest none.
    pairs = [
        {site.index: make_pair(site, rank=rank, seed=10 * rank + site.index) for site in sites.sites}
        for rank in (3, 8, 17)
    ]
    del pairs[2][1]  # the third adapter brings nothing for the second site
    weights = [ops.prepare_adapter(kernels, each, num_sites=len(sites.sites), dtype=dtype) for each in pairs]
    assert all(each.num_bytes for each in weights)
    runs = [(0, 3, 0), (4, 12, 1), (16, 1, 2)]
    sites.active.rows = tuple(
        AdapterRows(first_row=first, num_rows=num, weights=weights[idx]) for first, num, idx in runs
    )
    for site in sites.sites:
        x = rand(NUM_ROWS, site.in_features, seed=site.index).to(dtype)
        y = rand(NUM_ROWS, site.out_features, seed=99 + site.index).to(dtype)
        expected = y.double()
        for first, num, idx in runs:
            pair = pairs[idx].get(site.index)
            if pair is not None:
                rows = slice(first, first + num)
                expected[rows] += pair.scale * (x[rows].double() @ pair.a.double().t()) @ pair.b.double().t()
        before = y.clone()
        if is_part:
            wide = torch.full((NUM_ROWS, y.shape[1] + 8), torch.nan, dtype=dtype)
            y = wide[:, 5:-3].copy_(y)
        got = ops.lora(kernels, x, y, site)
        if is_part:
            assert int(wide.isnan().sum()) == 8 * NUM_ROWS
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        untouched = [3, *range(17, NUM_ROWS), *([16] if site.index == 1 else [])]
        assert torch.equal(got[untouched], before[untouched])
