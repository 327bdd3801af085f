"""GGUF files as checkpoints: block formats, names, config. The header is read by `text/gguf`.

`source` opens one: a `stored.TensorSource` and the `config.json` that the metadata stands for.
"""
