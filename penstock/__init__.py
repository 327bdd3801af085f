"""Penstock: serve open-weight language models to many people at once.

`from penstock import LLM, SamplingParams` is the offline API; the names are looked up when they are first
used, so that a process which imports a part of the package never loads torch for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.cli.offline import LLM as LLM
    from penstock.cli.structured_outputs import StructuredOutputsParams as StructuredOutputsParams
    from penstock.core.params import SamplingParams as SamplingParams

_LAZY = {
    "LLM": "penstock.cli.offline",
    "SamplingParams": "penstock.core.params",
    "StructuredOutputsParams": "penstock.cli.structured_outputs",
}

__all__ = ["LLM", "SamplingParams", "StructuredOutputsParams"]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'penstock' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
