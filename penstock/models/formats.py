"""From a path to a model's config and tensors, be it a folder, quantized or not, or a GGUF file.

Headers are checked here; data is read by `parts`, tensor by tensor.
"""

from pathlib import Path

from penstock.core.errors import CheckpointError
from penstock.models.config import ConfigReader, read_json_config
from penstock.models.gguf.source import open_gguf
from penstock.models.quantized.select import open_source
from penstock.models.stored import TensorSource
from penstock.text.gguf.header import is_gguf


def open_model(path: Path) -> tuple[ConfigReader, TensorSource]:
    """Config and tensors of a checkpoint folder or a GGUF file.

    Raises:
        CheckpointError: there is no such path, or a header is damaged.
        UnsupportedModelError: a format that is not known.
    """
    if is_gguf(path):
        return open_gguf(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    config = read_json_config(path / "config.json")
    return config, open_source(path, config)
