"""The obvious version of every operation, in float64, and the oracle of the other homes.

A row's result does not depend on the other rows of the call, on chunking or on batch size. It is slow
and meant to be; `kernels/eager` is the fast home. `kernels/registry` builds it.
"""
