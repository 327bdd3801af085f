"""`python -m tools.make_checkpoint SHAPE OUT_DIR [flags]`."""

import argparse
import re
import sys
from dataclasses import fields, replace
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tools.make_checkpoint.checkpoint import make_checkpoint
from tools.make_checkpoint.shapes import ARCHITECTURES, SHAPES, Shape
from tools.make_checkpoint.weights import DTYPES

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def _num_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)(KB|MB|GB)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 2GB")
    return int(match[1]) * UNITS[match[2] or ""]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make_checkpoint", description=__doc__)
    parser.add_argument("shape", choices=SHAPES, help="named shape; the flags below change parts of it")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--architecture", choices=ARCHITECTURES)
    for field in fields(Shape):
        if field.name not in ("architecture", "tied"):
            kind = float if field.name.startswith("rope_") else int
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind)
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, help="share embedding and head")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where numbers are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-size", type=_num_bytes, default="2GB")
    return parser


def _shape(args: argparse.Namespace) -> Shape:
    names = [field.name for field in fields(Shape)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(SHAPES[args.shape], **given)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 2 for a shape that cannot be."""
    args = _parser().parse_args(argv)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with Progress(*columns) as progress:
            task = progress.add_task("tokenizer and weights", total=None)
            make_checkpoint(
                args.out_dir,
                _shape(args),
                dtype=args.dtype,
                seed=args.seed,
                device=args.device,
                max_shard_bytes=args.max_shard_size,
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
    except ValueError as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
