"""Averages the weights of two checkpoints of one run: of where it ended first and where it ended again.

A run that was taken up again keeps much of what it knew and gains what it was shown; the mean of both ends
does both better than either. Counters and optimizer state are those of the later checkpoint.

**Source:** Wortsman et al., Model soups (2022), section 3.
"""

import argparse
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

WEIGHT = "weight:"


def average(earlier: Path, later: Path, output: Path, *, share: float) -> None:
    """Write `later` with weights that are `share` its own and the rest those of `earlier`.

    Args:
        earlier: checkpoint.
        later: checkpoint of the same sizes.
        output: checkpoint to write.
        share: of the later weights in the mean, 0 to 1.

    Raises:
        ValueError: the checkpoints are not of one network.
    """
    first, second = load_file(earlier), load_file(later)
    names = sorted(name for name in second if name.startswith(WEIGHT))
    if names != sorted(name for name in first if name.startswith(WEIGHT)):
        raise ValueError(f"{earlier} and {later} are not checkpoints of one network")
    for name in names:
        second[name] = first[name] * (1 - share) + second[name] * share
    with safe_open(later, framework="pt") as file:
        metadata = file.metadata()
    save_file(second, output, metadata)


def main() -> None:
    """Average from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--earlier", type=Path, required=True)
    parser.add_argument("--later", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.5, help="of the later weights")
    arguments = parser.parse_args()
    average(arguments.earlier, arguments.later, arguments.output, share=arguments.share)


if __name__ == "__main__":
    main()
