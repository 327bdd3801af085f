"""`python -m penstock.sim --seed N [--count K] [--async]`: replay one seed, or run several in a row."""

import argparse
import sys
import traceback

from penstock.sim.simulator import replay_line, simulate


def main(arguments: list[str] | None = None) -> int:
    """Run the seeds; returns 1 at the first failure, after saying how to replay it."""
    parser = argparse.ArgumentParser(prog="python -m penstock.sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--count", type=int, default=1, help="how many seeds in a row")
    parser.add_argument("--async", action="store_true", dest="is_async", help="with one step of asynchrony")
    options = parser.parse_args(arguments)
    for seed in range(options.seed, options.seed + options.count):
        try:
            outcome = simulate(seed, is_async=options.is_async)
        except Exception:  # noqa: BLE001 - the edge of a seed: whatever broke, say how to see it again
            traceback.print_exc()
            print(replay_line(seed, is_async=options.is_async))
            return 1
        print(outcome)
    return 0


if __name__ == "__main__":
    sys.exit(main())
