"""From `quantization_config` to the format that reads the files; what is not known is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from penstock.core.errors import UnsupportedModelError
from penstock.models.checkpoint import open_checkpoint
from penstock.models.config import ConfigReader
from penstock.models.quantized.awq import read_awq
from penstock.models.quantized.bitsandbytes import read_bitsandbytes
from penstock.models.quantized.compressed_tensors import read_compressed_tensors
from penstock.models.quantized.fp8 import read_fp8
from penstock.models.quantized.gptq import read_gptq
from penstock.models.quantized.scheme import QuantizedCheckpoint, Scheme
from penstock.models.stored import TensorSource

FIELD: Final = "quantization_config"
METHODS: Final[dict[str, Callable[[ConfigReader], Scheme]]] = {
    "awq": read_awq,
    "gptq": read_gptq,
    "compressed-tensors": read_compressed_tensors,
    "bitsandbytes": read_bitsandbytes,
    "fp8": read_fp8,
}
"""By `quant_method`: reads the rest of the section."""


def read_scheme(config: ConfigReader) -> Scheme:
    """The format that a `config.json` with a `quantization_config` names.

    Raises:
        UnsupportedModelError: method, bits or layout are not known; says which are.
        CheckpointError: a field is missing or out of range.
    """
    section = config.section(FIELD)
    method = section.text("quant_method", "")
    if method not in METHODS:
        raise UnsupportedModelError(
            f"{section.source}: field 'quant_method' is {method[:80]!r}, which is not supported; "
            f"known: {', '.join(METHODS)}, and GGUF files",
            param=FIELD,
        )
    return METHODS[method](section)


def open_source(folder: Path, config: ConfigReader) -> TensorSource:
    """The tensors of a checkpoint folder, quantized or not.

    Raises:
        CheckpointError: a header is damaged; names file, tensor, what was expected and what was found.
        UnsupportedModelError: as `read_scheme`.
    """
    scheme = read_scheme(config) if config.has(FIELD) else None
    files = open_checkpoint(folder)
    return files if scheme is None else QuantizedCheckpoint(files, scheme)
