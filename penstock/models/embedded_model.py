"""Where the model and its draft lie that come with the package; the folder `embedded/` holds data only."""

from pathlib import Path
from typing import Final

EMBEDDED_MODEL_NAME: Final = "penstock-tales"


def embedded_path() -> Path:
    """The folder of the embedded checkpoint, which `serve` uses when no model is named."""
    return Path(__file__).parent / "embedded"


def embedded_draft_path() -> Path:
    """The folder of the draft that foretells the embedded model; its tokenizer is the same."""
    return embedded_path() / "draft"
