"""What is checked and measured on a machine with a CUDA device: `python -m benchmarks.device`."""
