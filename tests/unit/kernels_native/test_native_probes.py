"""The probes measure something, and refuse what cannot be measured. No figure is asserted: machines differ."""

import pytest

from penstock.kernels.cpu import _native

POOLS = {threads: _native.Pool(threads, [], 0) for threads in (1, 2)}


@pytest.mark.parametrize("threads", [1, 2])
def test_reading_takes_time(threads):
    assert 1e6 < _native.read_bandwidth(POOLS[threads], num_bytes=(4 << 20) + 12345, passes=2) < 1e14


@pytest.mark.parametrize("isa", [isa for isa in _native.supported_isas() if isa != "amx_emulated"])
def test_a_wider_instruction_set_multiplies(isa):
    found = {"bf16", "int8", "f32"}
    if isa in {"scalar", "avx2"}:
        found.remove("bf16")
    if isa == "scalar":
        found.remove("int8")
    for dtype in found:
        assert _native.multiply_peak(POOLS[1], isa=isa, dtype=dtype, seconds=1e-4) > 1e6


@pytest.mark.parametrize(("isa", "dtype"), [("scalar", "bf16"), ("scalar", "int8"), ("amx_emulated", "bf16")])
def test_what_has_no_instruction_is_refused(isa, dtype):
    if isa not in _native.supported_isas():
        pytest.skip("this CPU cannot emulate tiles")
    with pytest.raises(ValueError, match="no such multiplication"):
        _native.multiply_peak(POOLS[1], isa=isa, dtype=dtype, seconds=1e-4)


def test_unknown_words_and_sizes_are_refused():
    with pytest.raises(ValueError, match="bf16, int8 or f32"):
        _native.multiply_peak(POOLS[1], isa="scalar", dtype="fp8", seconds=1e-4)
    with pytest.raises(ValueError, match="1 MiB a thread"):
        _native.read_bandwidth(POOLS[2], num_bytes=1 << 20, passes=1)
    with pytest.raises(ValueError, match="passes"):
        _native.read_bandwidth(POOLS[1], num_bytes=1 << 20, passes=0)
