"""Checks and measurements on a CUDA device, in stages: `python -m benchmarks.device [STAGE ...]`.

Every stage runs in a process of its own with its own time limit, so that none takes the others with it. Its
numbers go to OUT/STAGE.json; a short table of what has something to reach is printed at the end. Where the
environment has a folder $OUT, of which few files come back, all that was found so far is in its device.json
after each stage. `--dry-run` runs everything with tiny sizes on the CPU, kernels interpreted.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.report import environment

COLLECTED = os.environ.get("OUT")
"""A folder whose files are carried away, a few of them."""
DEFAULT_OUT = (
    Path("/tmp/penstock-results")  # noqa: S108  kept from call to call, by choice
    if COLLECTED
    else Path(__file__).parent.parent / "results" / "device"
)


def _parser(names: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.device", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"any of {', '.join(names)}; all if none")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, kernels interpreted")
    parser.add_argument("--models", type=Path, default=Path("/tmp/penstock-models"))  # noqa: S108  large, kept by choice
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--limit-s", type=int, default=560, help="seconds for all stages together")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    return parser


def _run_here(name: str, options: argparse.Namespace) -> None:
    """The stage itself; writes its result."""
    from benchmarks.device.setup import Setup
    from benchmarks.device.stages import STAGES

    setup = Setup(is_dry=options.dry_run, models=options.models, out=options.out)
    began_s = time.monotonic()
    results, bars = STAGES[name][0](setup)
    record = {
        "stage": name,
        "is_dry_run": options.dry_run,
        "environment": {**environment(), **_device_versions()},
        "seconds": round(time.monotonic() - began_s, 1),
        "results": results,
        "bars": [bar.record() for bar in bars],
    }
    (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _device_versions() -> dict[str, Any]:
    import torch
    import triton

    is_there = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name(0) if is_there else "none",
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def _run_apart(name: str, options: argparse.Namespace, *, limit_s: float) -> str:
    """One stage in a process of its own; says how it ended."""
    flags = ["--models", str(options.models), "--out", str(options.out), "--in-process"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.device",
        name,
        *flags,
        *(["--dry-run"] if options.dry_run else []),
    ]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if options.dry_run:
        env["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(command, env=env, process_group=0)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"took more than {limit_s:.0f} s"
    finally:  # and whatever it has started, which would go on using the device
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "done" if code == 0 else f"failed with {code}"


def _collect(out: Path, folder: Path) -> None:
    """All results so far as one file of a folder."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))}
    (folder / "device.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _table(names: list[str], ends: dict[str, str], out: Path) -> bool:
    """Print what came of the stages; True if every one ended well and met its bars."""
    is_good = True
    for name in names:
        path = out / f"{name}.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"bars": []}
        print(f"{name}: {ends[name]}, {record.get('seconds', '?')} s")
        is_good &= ends[name] == "done"
        for bar in record["bars"] if ends[name] == "done" else []:
            limit = f">= {bar['at_least']}" if bar["at_least"] is not None else ""
            limit += f"<= {bar['at_most']}" if bar["at_most"] is not None else ""
            word = "" if not limit or record["is_dry_run"] else "met" if bar["is_met"] else "NOT MET"
            print(f"   {bar['name']:60} {bar['value']:12.4g} {bar['unit']:8} {limit:10} {word}")
            is_good &= bar["is_met"]
    return is_good


def main() -> int:
    """Run the stages that are asked for."""
    from benchmarks.device.stages import STAGES

    options = _parser(list(STAGES)).parse_args()
    names = options.stages or list(STAGES)
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        print(f"no such stage: {', '.join(unknown)}; there are {', '.join(STAGES)}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    if options.in_process:
        _run_here(names[0], options)
        return 0
    end_s, ends = time.monotonic() + options.limit_s, {}
    for name in names:
        left_s = end_s - time.monotonic()
        print(f"== {name}", flush=True)
        ends[name] = (
            _run_apart(name, options, limit_s=min(left_s, STAGES[name][1])) if left_s > 5 else "no time left"
        )
        if COLLECTED:
            _collect(options.out, Path(COLLECTED))
    return 0 if _table(names, ends, options.out) or options.dry_run else 1


if __name__ == "__main__":
    sys.exit(main())
