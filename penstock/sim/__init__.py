"""The real scheduler and KV manager under a virtual clock, a fake runner and seeded workloads.

A seed decides everything, so that any failure can be replayed: `python -m penstock.sim --seed N`. Nothing
here computes a model, sleeps or does I/O. Called by `tests/sim` and by people.
"""
