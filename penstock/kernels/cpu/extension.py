"""Whether the extension module can be used here, and with which instruction set.

Safe to import where the module is not there.
"""

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Final

from penstock.core.errors import StartupError

ISAS: Final = ("scalar", "avx2", "avx512", "amx_emulated", "amx")
"""As `csrc/include/penstock/isa.h` names them."""
ISA_VARIABLE: Final = "PENSTOCK_ISA"
BY_NAME_ONLY: Final = ("amx_emulated",)
"""Made for tests: never chosen by itself."""


def why_missing() -> str | None:
    """Why the extension module cannot be imported; None if it can."""
    try:
        importlib.import_module("penstock.kernels.cpu._native")
    except ImportError as error:
        if "_native" in str(error) and "cannot open" not in str(error) and "undefined" not in str(error):
            return "the extension module was not built (a C++ compiler is needed at installation)"
        return f"the extension module cannot be loaded: {error}"
    return None


def usable_isas() -> list[str]:
    """What this CPU runs, the slowest first; the extension module must be there."""
    return list(importlib.import_module("penstock.kernels.cpu._native").supported_isas())


def choose_isa(asked: str = "auto", *, environ: Mapping[str, str] = os.environ) -> str:
    """The instruction set to use.

    Args:
        asked: a name, or `auto` for what the environment says, or the best.
        environ: read for `PENSTOCK_ISA`.

    Raises:
        StartupError: it is not known, or this CPU does not run it; the message lists what it runs.
    """
    origin, name = ("isa", asked) if asked != "auto" else (ISA_VARIABLE, environ.get(ISA_VARIABLE, "auto"))
    usable = usable_isas()
    if name == "auto":
        return [isa for isa in usable if isa not in BY_NAME_ONLY][-1]
    if name not in usable:
        what = "this CPU does not run" if name in ISAS else "there is no such instruction set as"
        raise StartupError(
            f"{origin} is {name!r:.80}: {what} {name[:40]}; what can be used: {', '.join(usable)}",
            param="isa",
        )
    return name


def check_cpus(cpus: Sequence[int]) -> None:
    """Refuse to pin threads to CPUs that this process may not use.

    Raises:
        StartupError: names the first of them and those that there are.
    """
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(cpus)
    for cpu in cpus:
        if cpu not in usable:
            names = ", ".join(map(str, sorted(usable)))
            raise StartupError(
                f"thread_affinity names CPU {cpu}, this process may use {names}", param="thread_affinity"
            )


def default_num_threads(environ: Mapping[str, str] = os.environ) -> int:
    """The CPUs that this process may use, or what `OMP_NUM_THREADS` says."""
    given = environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
