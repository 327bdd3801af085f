"""Architecture names and the files that build them.

A model here is one file plus one line in `ARCHITECTURES`; a model from outside is an entry point in the
group `penstock.models` whose name is the architecture and whose object is its `build_model`.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final, TypeAlias, cast

from penstock.core.errors import UnsupportedModelError

if TYPE_CHECKING:
    # At run time these bring torch; the command line asks here which architectures are known without it.
    from penstock.models.config import ConfigReader
    from penstock.models.interface import CausalLM
    from penstock.models.parts import Parts

BuildModel: TypeAlias = "Callable[[ConfigReader, Parts], CausalLM]"
"""`build_model(config, parts)`: reads the config, then takes every tensor from `parts`."""

ENTRY_POINT_GROUP: Final = "penstock.models"
ARCHITECTURES: Final = {
    "GPT2LMHeadModel": "penstock.models.gpt2",
    "Gemma2ForCausalLM": "penstock.models.gemma2",
    "Gemma3ForCausalLM": "penstock.models.gemma3",
    "LlamaForCausalLM": "penstock.models.llama",
    "MistralForCausalLM": "penstock.models.mistral",
    "MixtralForCausalLM": "penstock.models.mixtral",
    "Phi3ForCausalLM": "penstock.models.phi3",
    "Qwen2ForCausalLM": "penstock.models.qwen2",
    "Qwen3ForCausalLM": "penstock.models.qwen3",
    "Qwen3MoeForCausalLM": "penstock.models.qwen3_moe",
}
"""By the word in `architectures` of `config.json`: the module with its `build_model`."""

CLASSIFIERS: Final = {
    "GPT2ForSequenceClassification": "GPT2LMHeadModel",
    "Gemma2ForSequenceClassification": "Gemma2ForCausalLM",
    "Gemma3TextForSequenceClassification": "Gemma3ForCausalLM",
    "LlamaForSequenceClassification": "LlamaForCausalLM",
    "MistralForSequenceClassification": "MistralForCausalLM",
    "MixtralForSequenceClassification": "MixtralForCausalLM",
    "Phi3ForSequenceClassification": "Phi3ForCausalLM",
    "Qwen2ForSequenceClassification": "Qwen2ForCausalLM",
    "Qwen3ForSequenceClassification": "Qwen3ForCausalLM",
    "Qwen3MoeForSequenceClassification": "Qwen3MoeForCausalLM",
}
"""Decoders whose head scores classes instead of tokens, and which decoder each is."""

REFUSED: Final = {
    "Gemma3ForConditionalGeneration": "it has a vision tower, which is not supported; "
    "text-only checkpoints of Gemma 3 name Gemma3ForCausalLM",
}
"""Architectures that look like a known one, and why they are not."""


def known_architectures() -> list[str]:
    """Every architecture that can be loaded, sorted; those from outside included."""
    return sorted(
        {*ARCHITECTURES, *CLASSIFIERS, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))}
    )


def check_architecture(architecture: str) -> None:
    """Refuse an architecture that cannot be loaded, without importing any.

    Raises:
        UnsupportedModelError: it is not known; the message lists what is.
    """
    known = known_architectures()
    if architecture not in known:
        reason = f": {REFUSED[architecture]}" if architecture in REFUSED else ""
        raise UnsupportedModelError(
            f"architecture {architecture[:200]!r} is not supported{reason}; known: {', '.join(known)}",
            param="architectures",
        )


def find_model(architecture: str) -> BuildModel:
    """The function that builds an architecture.

    Raises:
        UnsupportedModelError: it is not known; the message lists what is.
    """
    check_architecture(architecture)
    decoder = CLASSIFIERS.get(architecture, architecture)
    if decoder in ARCHITECTURES:
        return cast("BuildModel", import_module(ARCHITECTURES[decoder]).build_model)
    point = next(iter(entry_points(group=ENTRY_POINT_GROUP, name=architecture)))
    return cast("BuildModel", point.load())
