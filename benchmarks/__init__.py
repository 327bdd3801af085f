"""Programs that measure, and check what they measure: `python -m benchmarks.NAME --write`."""
