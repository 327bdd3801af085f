"""Settings for every test: Triton interpreted, and one compute thread each, so that two workers do not fight for two cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if os.environ.get("PENSTOCK_TEST_DEVICE", "cpu") == "cpu":  # else `benchmarks.device` runs tests on a device
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its kernels run on the CPU
os.environ["HF_HUB_OFFLINE"] = "1"
