"""What HTTP, text and the process boundary add to a request: E2EL at the client over the engine's own time.

The engine's time of a request is what its clock saw, from arrival to the last token
(`penstock_request_queue_time_seconds` + `penstock_request_inference_time_seconds`); the client's CPU time is
subtracted from the client's E2EL, because it is the load generator's cost on the same cores. Prompts of 64 to
256 tokens, 64 out, closed loop.
"""

import random
import re
import urllib.request
from typing import Any

from benchmarks.report import arguments, finish, median
from benchmarks.served import served
from penstock.bench.load import run_load
from penstock.bench.target import Target
from penstock.bench.workload import from_lists

BARS = {1: 0.03, 32: 0.08}
"""Most overhead, as a share of the engine's time, by concurrency."""


def engine_time_s(url: str) -> float:
    """Seconds that the engine spent on all requests so far."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:  # noqa: S310 - loopback
        text = reply.read().decode()
    names = ("queue_time", "inference_time")
    pattern = r"^penstock_request_{}_seconds_sum\S* (\S+)$"
    found = [re.search(pattern.format(name), text, re.MULTILINE) for name in names]
    return sum(float(match.group(1)) for match in found if match)


def measure(url: str, *, model: str, concurrency: int, per_user: int, seed: int) -> dict[str, Any]:
    """One closed-loop run."""
    rng = random.Random(seed)
    num = concurrency * per_user
    prompts = [[rng.randrange(1000, 4000) for _ in range(rng.randint(64, 256))] for _ in range(num)]
    workload = from_lists(prompts, output_lens=[64] * num, max_concurrency=concurrency)
    before_s = engine_time_s(url)
    result = run_load(workload, Target(base_url=url, model=model, ignore_eos=True))
    failures = [record.failure for record in result.records if record.failure]
    assert not failures, failures[0]
    e2el_s = sum(record.e2el_s for record in result.records) - result.cost.cpu_s
    inside_s = engine_time_s(url) - before_s
    return {
        "e2el_ms": round(e2el_s / num * 1e3, 2),
        "engine_ms": round(inside_s / num * 1e3, 2),
        "client_cpu_ms": round(result.cost.cpu_s / num * 1e3, 2),
        "overhead": round(e2el_s / inside_s - 1, 4),
    }


def main() -> int:
    """Run it."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="", help="folder; without one, the embedded model")
    parser.add_argument("--flags", default="", help="more flags for penstock serve")
    options = parser.parse_args()
    runs: dict[int, list[dict[str, Any]]] = {}
    flags = ([options.model] if options.model else []) + options.flags.split()
    with served(*flags, "--served-model-name", "m", "--no-enable-prefix-caching") as server:
        measure(server.url, model="m", concurrency=2, per_user=1, seed=1)
        for each in range(1 if options.tiny else options.rounds):
            for concurrency, per_user in ((1, 4), (8, 3), (32, 2)):
                one = measure(
                    server.url, model="m", concurrency=concurrency, per_user=per_user, seed=100 + each
                )
                runs.setdefault(concurrency, []).append(one)
    overheads = {c: median([one["overhead"] for one in many]) for c, many in runs.items()}
    return finish(
        "http_overhead",
        options=options,
        sizes={"prompt": "64 to 256", "output": 64, "model": options.model or "penstock-tales"},
        results={"overhead_median": overheads, "runs": runs, "bars": BARS},
        ok=options.tiny or all(overheads[c] <= bar for c, bar in BARS.items()),
    )


if __name__ == "__main__":
    raise SystemExit(main())
