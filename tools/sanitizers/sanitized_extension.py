"""Pytest plugin: the extension module that PENSTOCK_SANITIZED_EXTENSION names stands in for the installed."""

import importlib.util
import os
import sys
from typing import Final

MODULE: Final = "penstock.kernels.cpu._native"


def pytest_configure() -> None:
    """Load it before any test imports the kernels."""
    spec = importlib.util.spec_from_file_location(MODULE, os.environ["PENSTOCK_SANITIZED_EXTENSION"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[MODULE] = module
