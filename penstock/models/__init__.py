"""Architectures, one file each, and the loader that turns a checkpoint folder into one of them.

No scheduling, no sampling, no tokenizer. `engine/runner` loads a model here and drives it with a
`ForwardBatch`; `cli` resolves names and the embedded model's folder here.
"""
