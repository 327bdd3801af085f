"""An `LLM` that nobody closed leaves nothing behind and says nothing: when it is dropped, and at the end."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = """
import gc, threading
from pathlib import Path
from penstock import LLM

def start():
    options = dict(max_model_len=32, num_kv_blocks=32, max_num_seqs=2, max_num_batched_tokens=32, num_threads=1)
    return LLM(tensor_parallel_size=2, **options)

def ranks():
    return [task.parent for task in Path("/proc/self/task").glob("*/children") if task.read_text().split()]

llm = start()
assert ranks()
del llm
gc.collect()
assert not ranks()
assert not [thread.name for thread in threading.enumerate() if thread.name in ("penstock-engine", "penstock-loop")]
llm = start()
print("two groups, one after the other", flush=True)
"""


def test_ranks_and_folders_of_an_llm_without_close_end_with_it() -> None:
    """The second one lives until the interpreter ends; warnings are errors, and would be on stderr."""
    with tempfile.TemporaryDirectory(prefix="p") as scratch:  # a short name, for sockets
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", SCRIPT],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TMPDIR": scratch},
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "two groups, one after the other\n"
        assert not any(Path(scratch).iterdir())
