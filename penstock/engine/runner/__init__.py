"""Execution: a `StepPlan` in, a `StepResult` out.

It builds the flat inputs, owns the KV memory, runs the model and samples. It decides nothing: which tokens,
which blocks and when is the scheduler's. `engine/core` calls it through `rank_group`.

To be read in the order of a step; `runner` joins it:

```
plan > last_tokens > input_batch > forward > inspection > step_draws > result
       what the       flat         hidden    who is       host_draws,
       step before    tensors      states,   sound        device_draws
       drew                        logits
```

beside it

```
ranks       rank_group, rank_processes, overlapped_rank            who computes together
faults      step_passes, failures, memory_shortage, canary         one sequence's fault stays with it
shortcuts   decode_arrays, decode_steps, recordings, cuda_graphs   a step of decodes as one call
memory      kv_pool, host_blocks, kv_budget, stored_weights        who holds which bytes, and gives them back
start       rehearsal, warmup                                      steps of our own before the first request
```
"""
