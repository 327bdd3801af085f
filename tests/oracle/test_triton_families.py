"""Every family (some are slow) through the whole engine on the Triton kernels, interpreted: the same greedy tokens."""

import os
from pathlib import Path

import pytest

from tests.oracle.checkpoints import FAMILIES, tiny_checkpoint
from tests.oracle.greedy_engine import greedy_answers

DEVICE = os.environ.get("PENSTOCK_TEST_DEVICE", "cpu")
"""`cuda` where `benchmarks.device` runs this on a device, without the interpreter."""


INTERPRETED = ("gemma2", "gpt2", "llama", "mixtral")
"""Caps and windows, no rope and biases, the plain one, experts; the others share their kernels with these."""


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in INTERPRETED else [pytest.mark.slow])
        for family in sorted(FAMILIES)
    ],
)
def test_the_device_path_answers_as_the_reference(family: str, tmp_path: Path) -> None:
    """Chunks, mixed steps and decodes; tokens stay where they are drawn while the next step is planned."""
    path = tiny_checkpoint(family, tmp_path)
    wanted = greedy_answers(path, is_short=True, dtype="float32", kernels="reference")
    options = {"kernels": "triton", "device": DEVICE, "block_size": 16, "async_scheduling": True}
    assert greedy_answers(path, is_short=True, dtype="float32", **options) == wanted
