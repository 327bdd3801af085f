"""Drives transformers' continuous batching. Runs under that peer's Python; see `contender` for the lines.

usage: transformers_runner.py '{"model": FOLDER, "num_threads": N, "max_seqs": N}'

One line tells the version when the model is loaded; then each line in is a scenario and each line out is what
became of it. Times are seconds after the scenario's start, taken when its manager hands a token over.
"""

import json
import sys
import time
from importlib import import_module
from typing import Any

torch: Any = import_module("torch")  # Any: not typed here, lives in the peer's environment
hf: Any = import_module("transformers")  # Any: as above

PAGE_TOKENS = 256
NUM_PAGES = 256
STEP_TOKENS = 1024


def start_manager(settings: dict[str, Any]) -> Any:  # Any: JSON in, the peer's manager out
    """Load the model and start its batching thread."""
    torch.set_num_threads(settings["num_threads"])
    torch.set_num_interop_threads(1)
    model = hf.AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    generation = hf.GenerationConfig(max_new_tokens=256, do_sample=False, eos_token_id=-1, pad_token_id=0)
    config = hf.ContinuousBatchingConfig(
        num_blocks=NUM_PAGES, page_size=PAGE_TOKENS, max_batch_tokens=STEP_TOKENS
    )
    manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=config)
    manager.start()
    return manager


class Scenario:
    """One scenario under way."""

    def __init__(self, manager: Any, question: dict[str, Any]) -> None:  # Any: the peer's manager; JSON
        self.manager = manager
        self.question = question
        self.waiting = list(question["requests"])
        self.num_places = question["max_concurrency"] or len(self.waiting)
        self.records: dict[str, dict[str, Any]] = {}  # Any: JSON
        self.late_id: str | None = None
        self.num_running = 0
        self.began_s = time.perf_counter()

    def run(self) -> dict[str, object]:
        """Read until all is answered."""
        self.fill()
        while self.num_running:
            self.take(self.manager.get_result(timeout=1))
            self.fill()
            self.send_late()
        duration_s = time.perf_counter() - self.began_s
        late = None if self.late_id is None else self.records.pop(self.late_id)
        return {"duration_s": duration_s, "records": list(self.records.values()), "late": late}

    def send(self, request: dict[str, Any]) -> str:  # Any: JSON
        """Queue a request of token ids; returns its id."""
        start_s = time.perf_counter() - self.began_s
        key: str = self.manager.add_request(
            request["prompt"], max_new_tokens=request["max_tokens"], streaming=True
        )
        self.records[key] = {"start_s": start_s, "times_s": [], "num_tokens": 0}
        self.num_running += 1
        return key

    def fill(self) -> None:
        """Send what may be in flight."""
        while self.waiting and self.num_running < self.num_places:
            self.send(self.waiting.pop(0))

    def take(self, result: Any) -> None:  # Any: the peer's result, or None after its timeout
        """Take what the manager handed over."""
        now_s = time.perf_counter() - self.began_s
        if result is None:
            if not self.manager.is_running():
                raise RuntimeError("its batching thread has ended")
            return
        record = self.records[result.request_id]
        count = len(result.generated_tokens) - record["num_tokens"]
        record["times_s"] += [now_s] * count
        record["num_tokens"] += count
        if result.is_finished():
            self.num_running -= 1
            if result.error:
                record["error"] = str(result.error)

    def send_late(self) -> None:
        """Send the late request once every stream has its tokens."""
        late = self.question["late"]
        least = self.question["late_after_tokens"]
        if late is None or self.late_id is not None:
            return
        if all(record["num_tokens"] >= least for record in self.records.values()):
            self.late_id = self.send(late)


def main() -> None:
    """Load, then answer lines until there are no more."""
    manager = start_manager(json.loads(sys.argv[1]))
    print(json.dumps({"version": hf.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(Scenario(manager, json.loads(line)).run()), flush=True)


if __name__ == "__main__":
    main()
