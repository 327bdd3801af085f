"""Execution: a `StepPlan` in, a `StepResult` out.

It builds the flat inputs, owns the KV memory, runs the model and samples. It decides nothing: which tokens,
which blocks and when is the scheduler's. `engine/core` calls it through `rank_group`.
"""
