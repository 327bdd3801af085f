"""Drives OpenVINO GenAI's continuous batching. Runs under that peer's Python; see `contender` for the lines.

usage: openvino_runner.py '{"model": FOLDER, "num_threads": N, "max_seqs": N}'

One line tells the version when the model is loaded; then each line in is a scenario and each line out is what
became of it. Times are seconds after the scenario's start, taken after each step of the pipeline.
"""

import json
import sys
import time
from importlib import import_module
from typing import Any

np: Any = import_module("numpy")  # Any: not typed here, lives in the peer's environment
ov: Any = import_module("openvino")  # Any: as above
genai: Any = import_module("openvino_genai")  # Any: as above

CACHE_GB = 3
CHUNK_TOKENS = 256


class Pipeline:
    """The peer, and ids for its requests."""

    def __init__(self, settings: dict[str, Any]) -> None:  # Any: JSON
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.max_num_seqs = settings["max_seqs"]
        scheduler.max_num_batched_tokens = CHUNK_TOKENS
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": settings["num_threads"], "PERFORMANCE_HINT": "LATENCY"}
        self.engine = genai.ContinuousBatchingPipeline(settings["model"], scheduler, "CPU", properties, {})
        self.num_requests = 0

    def add(self, request: dict[str, Any]) -> Any:  # Any: JSON in, the peer's handle out
        """Queue a request of token ids."""
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = request["max_tokens"]
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        self.num_requests += 1
        prompt = ov.Tensor(np.array([request["prompt"]], dtype=np.int64))
        return self.engine.add_request(self.num_requests, prompt, config)


class Scenario:
    """One scenario under way."""

    def __init__(self, pipeline: Pipeline, question: dict[str, Any]) -> None:  # Any: JSON
        self.pipeline = pipeline
        self.question = question
        self.waiting = list(question["requests"])
        self.num_places = question["max_concurrency"] or len(self.waiting)
        self.handles: list[Any] = []  # Any: the peer's handles
        self.records: list[dict[str, Any]] = []  # Any: JSON
        self.late: dict[str, Any] | None = None  # Any: JSON
        self.late_handle: Any = None  # Any: the peer's handle
        self.began_s = time.perf_counter()

    def run(self) -> dict[str, object]:
        """Step until all is answered."""
        self.fill()
        while self.pipeline.engine.has_non_finished_requests():
            self.pipeline.engine.step()
            self.read()
            self.fill()
            self.send_late()
        duration_s = time.perf_counter() - self.began_s
        return {"duration_s": duration_s, "records": self.records, "late": self.late}

    def now(self) -> float:
        """Seconds after the start."""
        return time.perf_counter() - self.began_s

    def num_running(self) -> int:
        """Of the scenario's own requests, those not answered yet."""
        asked = self.question["requests"]
        return sum(r["num_tokens"] < q["max_tokens"] for r, q in zip(self.records, asked, strict=False))

    def fill(self) -> None:
        """Send what may be in flight."""
        while self.waiting and self.num_running() < self.num_places:
            self.handles.append(self.pipeline.add(self.waiting.pop(0)))
            self.records.append({"start_s": self.now(), "times_s": [], "num_tokens": 0})

    def read(self) -> None:
        """Take the tokens of the step."""
        now_s = self.now()
        pairs = list(zip(self.handles, self.records, strict=True))
        if self.late is not None:
            pairs.append((self.late_handle, self.late))
        for handle, record in pairs:
            if handle.can_read():
                count = sum(len(output.generated_ids) for output in handle.read().values())
                record["times_s"] += [now_s] * count
                record["num_tokens"] += count

    def send_late(self) -> None:
        """Send the late request once every stream has its tokens."""
        late = self.question["late"]
        least = self.question["late_after_tokens"]
        if late is None or self.late is not None or any(r["num_tokens"] < least for r in self.records):
            return
        self.late_handle = self.pipeline.add(late)
        self.late = {"start_s": self.now(), "times_s": [], "num_tokens": 0}


def main() -> None:
    """Load, then answer lines until there are no more."""
    pipeline = Pipeline(json.loads(sys.argv[1]))
    print(json.dumps({"version": genai.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(Scenario(pipeline, json.loads(line)).run()), flush=True)


if __name__ == "__main__":
    main()
