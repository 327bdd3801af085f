"""Writes plain checkpoints in the quantized formats that Penstock reads, by rounding to nearest.

It is for tests and for the table in `docs/guide/quantized-checkpoints.md`; it calibrates nothing. Each writer
also says what its tensors stand for, computed before anything is packed.
"""
