"""`penstock bench`: the commands that measure, each in its own module and imported only when it is called.

Load over HTTP (`serve`, `sweep`) is in `bench_load`; what drives the engine itself is in `bench_engine`.
"""

from cyclopts import App

bench = App(name="bench", help="Measure a server, the engine or the kernels.", help_format="plaintext")

_ENGINE = "penstock.cli.bench_engine"
bench.command(
    "penstock.cli.bench_compare:compare", name="compare", help="Penstock beside other engines, in turns."
)

_LOAD = "penstock.cli.bench_load"
bench.command(f"{_LOAD}:serve", name="serve", help="Put load on an OpenAI-compatible server and measure it.")
bench.command(f"{_LOAD}:sweep", name="sweep", help="Raise the load on a server until it is saturated.")
bench.command(f"{_ENGINE}:offline", name="offline", help="The engine alone: tokens per second, step times.")
bench.command(
    "penstock.cli.bench_ladder:ladder",
    name="ladder",
    help="What each idea of serving is worth, rung by rung.",
)
bench.command(
    "penstock.cli.bench_compare:peer", name="peer", help="Start a peer's server as compare does, and keep it."
)
bench.command(f"{_ENGINE}:kernels", name="kernels", help="Each operation against the machine's limits.")
