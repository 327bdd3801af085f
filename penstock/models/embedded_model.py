"""Where the model lies that comes with the package; the folder `embedded/` holds data only."""

from pathlib import Path
from typing import Final

EMBEDDED_MODEL_NAME: Final = "penstock-tales"


def embedded_path() -> Path:
    """The folder of the embedded checkpoint, which `serve` uses when no model is named."""
    return Path(__file__).parent / "embedded"
