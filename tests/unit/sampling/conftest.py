"""Every test that asks for `every_sampler` runs with numpy and with each instruction set of the extension."""

from functools import partial

import pytest

from penstock.engine.sampling.native_sampler import NativeSampler
from penstock.kernels.cpu import _native

POOL = _native.Pool(2, [], 0)


@pytest.fixture(params=["numpy", *_native.supported_isas()])
def every_sampler(request, monkeypatch):
    """Puts the native passes into the `Sampler` that the test's module builds."""
    if request.param == "numpy":
        return
    native = NativeSampler(POOL, isa=request.param)
    monkeypatch.setattr(request.module, "Sampler", partial(request.module.Sampler, native=native))
