"""The API process and the lazy re-exports never load torch."""

import subprocess
import sys

import pytest

import penstock

MODULES = (
    "penstock",
    "penstock.server.app",
    "penstock.server.lifecycle",
    "penstock.text.service",
    "penstock.gateway.catalog",
    "penstock.observe.metrics",
    "penstock.engine.supervisor",
    "penstock.cli.serve",
    "penstock.cli.main",
)


def test_the_serving_process_never_imports_torch() -> None:
    code = f"import sys, {', '.join(MODULES)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_offline_names_are_re_exported() -> None:
    assert penstock.LLM.__module__ == "penstock.cli.offline"
    assert penstock.SamplingParams(max_tokens=3).max_tokens == 3


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = penstock.nonsense
