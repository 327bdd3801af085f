"""Sampling that a model's author suggests, for the fields that a client leaves out.

Read from `generation_config.json`, as vLLM does by default; a field of the request always wins. Called once
at start by `cli`, shown to the dialects through `ModelCard.default_sampling`.
"""

from pathlib import Path
from typing import Final

import msgspec

from penstock.core.errors import CheckpointError, InvalidParameterError
from penstock.core.params import SamplingParams, validate_sampling
from penstock.text.model_files import read_object

FILE: Final = "generation_config.json"
FIELDS: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_default_sampling(folder: Path) -> SamplingParams:
    """The suggestions of a checkpoint; neutral parameters where it has none.

    Raises:
        CheckpointError: a field has a wrong type or is out of range; the message names file and field.
    """
    values = read_object(folder / FILE)
    known = {name: values[name] for name in FIELDS if values.get(name) is not None}
    try:
        params = msgspec.convert(known, SamplingParams)
        validate_sampling(params)
    except (msgspec.ValidationError, InvalidParameterError) as error:
        raise CheckpointError(f"{FILE}: {error}") from None
    return params
