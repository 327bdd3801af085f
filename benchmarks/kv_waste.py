"""How much of the owned KV memory is unused over time, and whether 10,000 requests leak a block.

First part: prompts of 32 to 512 and answers of 16 to 256 tokens in a full batch; waste is owned but unused
slots over owned slots, averaged over time. Second part: short requests of which 30 % are cut off at a random
moment; afterwards no block may be owned, and free plus cached must be all.
"""

import asyncio
import random
import sys
import time
from contextlib import aclosing

from benchmarks.report import arguments, finish
from penstock.cli.local_model import LocalModel, LoopThread, StepTotals, open_local_model
from penstock.cli.model_source import find_model
from penstock.cli.workers import work_off
from penstock.core.ids import ModelName, RequestId
from penstock.core.params import SamplingParams
from penstock.core.text import GenerateRequest
from penstock.core.tokens import MemoryReport
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig

WASTE_BAR = 0.04
CUT_SHARE = 0.3
NUM_WORKERS = 96


def make_request(
    number: int, *, prompt_tokens: int, answer_tokens: int, rng: random.Random
) -> GenerateRequest:
    """A request with a random prompt."""
    params = SamplingParams(max_tokens=answer_tokens, ignore_eos=True, seed=number)
    prompt = tuple(rng.randrange(300, 3000) for _ in range(prompt_tokens))
    return GenerateRequest(
        request_id=RequestId(f"r{number}"), model=ModelName("penstock-tales"), prompt=prompt, params=params
    )


async def answer(local: LocalModel, request: GenerateRequest, *, cut_after: int | None) -> bool:
    """Read an answer, or leave after some deltas; True if it ended by itself with all its tokens."""
    num_tokens = num_deltas = 0
    async with aclosing(await local.service.generate(request)) as stream:
        if cut_after == 0:
            return False
        async for delta in stream:
            num_tokens += len(delta.token_ids)
            num_deltas += 1
            if num_deltas == cut_after:
                return False
    assert num_tokens == request.params.max_tokens, "every answer has its tokens"
    return True


async def waste_part(local: LocalModel, *, count: int, seed: int) -> None:
    """Mixed lengths, the queue never empty until the end."""
    rng = random.Random(seed)
    requests = [
        make_request(i, prompt_tokens=rng.randint(32, 512), answer_tokens=rng.randint(16, 256), rng=rng)
        for i in range(count)
    ]

    async def work(request: GenerateRequest) -> None:
        await answer(local, request, cut_after=None)

    await work_off(requests, work, num_workers=NUM_WORKERS)


async def leak_part(local: LocalModel, *, count: int, seed: int) -> tuple[int, MemoryReport]:
    """Short requests, 30 % cut off; returns how many ended by themselves and what is held afterwards."""
    rng = random.Random(seed)
    num_whole = 0

    async def work(number: int) -> None:
        nonlocal num_whole
        request = make_request(
            100_000 + number, prompt_tokens=rng.randint(1, 64), answer_tokens=rng.randint(1, 12), rng=rng
        )
        cut = rng.randrange(request.params.max_tokens or 1) if rng.random() < CUT_SHARE else None
        is_whole = await answer(local, request, cut_after=cut)
        num_whole += is_whole

    await work_off(range(count), work, num_workers=NUM_WORKERS)
    for _ in range(200):  # the last cancellations take effect within two steps
        memory = await local.engine.memory()
        if memory.kv_bytes_owned == 0 and not await local.engine.requests():
            break
        await asyncio.sleep(0.01)
    return num_whole, memory


def main() -> int:
    """Run it."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--waste-requests", type=int, default=256)
    parser.add_argument("--leak-requests", type=int, default=10_000)
    options = parser.parse_args()
    if options.tiny:
        options.waste_requests, options.leak_requests = 8, 50
    source = find_model(None)
    config = EngineConfig(
        model_path=str(source.path),
        model_revision=source.revision,
        max_model_len=1024,
        scheduler=SchedulerConfig(max_num_seqs=64),
        kv=KvConfig(num_blocks=3072),
    )
    totals = StepTotals()
    thread = LoopThread()
    local = thread.run(open_local_model(source, config, events=totals))
    start_s = time.perf_counter()
    thread.run(waste_part(local, count=options.waste_requests, seed=options.seed))
    waste = 1 - totals.slots_used_s / totals.slots_owned_s
    middle_s = time.perf_counter()
    num_whole, memory = thread.run(leak_part(local, count=options.leak_requests, seed=options.seed))
    end_s = time.perf_counter()
    leaked = memory.kv_bytes_total - memory.kv_bytes_free - memory.kv_bytes_cached
    info = local.info
    thread.run(local.close())
    thread.close()
    return finish(
        "kv_waste",
        options=options,
        sizes={
            "block_size": info.block_size,
            "num_blocks": info.num_blocks,
            "waste_requests": options.waste_requests,
            "leak_requests": options.leak_requests,
        },
        results={
            "waste_time_average": round(waste, 4),
            "waste_bar": WASTE_BAR,
            "waste_seconds": round(middle_s - start_s, 1),
            "leak_requests_whole": num_whole,
            "leak_requests_cut": options.leak_requests - num_whole,
            "leaked_blocks": leaked // info.bytes_per_block,
            "kv_bytes_owned_at_end": memory.kv_bytes_owned,
            "preemptions": totals.num_preemptions,
            "leak_seconds": round(end_s - middle_s, 1),
        },
        ok=(waste < WASTE_BAR or options.tiny) and leaked == 0 and memory.kv_bytes_owned == 0,
    )


if __name__ == "__main__":
    sys.exit(main())
