"""From a model's name to a folder on this machine: a path, or an id on the model hub.

Only data is fetched: safetensors, JSON, tokenizer and template files, never code or pickles. `cli` calls
this before any engine starts; the hub's library is imported only when an id has to be fetched.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from penstock.core.errors import StartupError

ALLOWED_FILES: Final = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "1_Pooling/config.json",
)
HUB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all so far known)."""


def _progress_bar(on_progress: Progress) -> type[Any]:  # tqdm ships no types
    """A progress bar class for the hub library that reports bytes and draws nothing."""
    from tqdm import tqdm  # type: ignore[import-untyped]  # tqdm ships no types

    class SilentBar(tqdm):  # type: ignore[misc]  # tqdm ships no types
        def __init__(self, *args: Any, **options: Any) -> None:  # the library's own arguments, passed on
            options["disable"] = False
            options.pop("name", None)
            super().__init__(*args, **options)

        def display(self, *_: Any, **__: Any) -> None:  # arguments of the drawing, which does not happen
            if self.unit == "B" and self.total:
                on_progress(int(self.n), int(self.total))

    return SilentBar


def _download(name: str, revision: str | None, on_progress: Progress | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    bar = None if on_progress is None else _progress_bar(on_progress)
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(ALLOWED_FILES), tqdm_class=bar)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0][:200]
        raise StartupError(
            f"model {name!r} is no local folder and could not be fetched from the hub: {reason}",
            param="model",
        ) from error


def resolve_model(
    name_or_path: str, revision: str | None = None, on_progress: Progress | None = None
) -> Path:
    """The local folder of a model.

    Args:
        name_or_path: a folder, or a hub id such as `org/name`.
        revision: branch, tag or commit on the hub; None takes the default branch.
        on_progress: told of bytes while fetching.

    Returns:
        An existing folder. Side effect: an id is fetched into the hub library's cache.

    Raises:
        StartupError: it is neither a folder nor a valid id, or the hub has not got it or is out of reach.
    """
    folder = Path(name_or_path).expanduser()
    if name_or_path and folder.is_dir():
        if revision is not None:
            raise StartupError(
                f"revision is {revision!r}, but {name_or_path!r} is a local folder", param="revision"
            )
        return folder
    if not HUB_ID.fullmatch(name_or_path):
        raise StartupError(f"model is {name_or_path!r}: no such folder, and not a hub id", param="model")
    return _download(name_or_path, revision, on_progress)
