"""Quantized safetensors checkpoints: one file per format, found by `quantization_config` of `config.json`.

`select` opens one; `grid` is what integer formats have in common. Weights whose grid the kernels have are
taken over with their numbers and scales (`RoundedWeight`); all others are dequantized while they are read.
"""
