"""GGUF files without torch: the header, and the tokenizer that its metadata describes.

`models/gguf` reads the tensors. A `.gguf` file stands for a model folder: `model_files` asks `folder` for the
files that such a folder would have.
"""
