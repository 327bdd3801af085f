"""Fast operations in plain torch, the home that `auto` takes on a CPU.

Few torch calls per layer, no Python loop over decoding sequences. Results may differ in the last bits
with batch size; where that must not be, `kernels/reference` serves. `kernels/registry` builds it.
"""
