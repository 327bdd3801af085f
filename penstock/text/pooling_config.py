"""How a model's prompts become vectors and scores, where its files or the operator say so.

Read once at start by `cli`; used by `pooler`.
"""

from pathlib import Path
from typing import Final, Literal

import msgspec

from penstock.core.errors import CheckpointError
from penstock.text.model_files import read_object

FILE: Final = "1_Pooling/config.json"
"""Of sentence-transformers."""
_MODES: Final[dict[str, Literal["mean", "last"]]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


class PoolingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What is not asked for by a request."""

    pooling: Literal["mean", "last"] = "last"
    """Of embeddings, where the request does not say."""
    score_yes_token: str = "yes"  # noqa: S105 - a word, not a secret
    """One token: the answer of a generative model that finds the document fitting."""
    score_no_token: str = "no"  # noqa: S105 - a word, not a secret
    """One token: its other answer."""


def read_pooling(folder: Path) -> Literal["mean", "last"]:
    """The pooling that a checkpoint was trained with; `last` where it says nothing.

    Raises:
        CheckpointError: it asks for one that is not known here, or for several.
    """
    modes = [
        name
        for name, value in read_object(folder / FILE).items()
        if name.startswith("pooling_mode_") and value is True
    ]
    if not modes:
        return "last"
    if len(modes) > 1 or modes[0] not in _MODES:
        raise CheckpointError(
            f"{FILE} asks for {', '.join(modes)[:200]}, known is one of {', '.join(_MODES)}"
        )
    return _MODES[modes[0]]
