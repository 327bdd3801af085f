"""Who owns a KV block: the pool, the prefix tree, the block tables and the manager that joins them.

Only bookkeeping of block ids; no tensor and no torch. Called by `engine/scheduler`; the runner sees the
outcome as block tables in a `StepPlan`.
"""
