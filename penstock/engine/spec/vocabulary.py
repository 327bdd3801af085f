"""Do two checkpoints mean the same by a token id? Asked at start of a draft model; reads two files.

A draft with other tokens would only guess badly, but it is always a mistake: it is refused.
"""

from pathlib import Path
from typing import Final

import msgspec

from penstock.core.errors import CheckpointError, StartupError

TOKENIZER_FILE: Final = "tokenizer.json"
MAX_TOKENIZER_BYTES: Final = 1 << 28


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]


class _TokenizerFile(msgspec.Struct):
    model: _Model
    added_tokens: list[_AddedToken] = []


def check_same_tokens(draft: Path, *, target: Path) -> None:
    """Compare the tokens of two model folders; a folder without a tokenizer of its own is taken on trust.

    Raises:
        StartupError: an id stands for another token; names the first.
        CheckpointError: a tokenizer file cannot be read.
    """
    files = [folder / TOKENIZER_FILE for folder in (draft, target)]
    if not all(file.is_file() for file in files):
        return
    ours, theirs = (_tokens(file) for file in files)
    for token_id in sorted(ours.keys() | theirs.keys()):
        if ours.get(token_id) != theirs.get(token_id):
            raise StartupError(
                f"speculative_config: token {token_id} is {ours.get(token_id)!r:.40} to the draft model and "
                f"{theirs.get(token_id)!r:.40} to the model: they must have one vocabulary",
                param="speculative_config",
            )


def _tokens(file: Path) -> dict[int, str]:
    try:
        if file.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(f"{file.name} has more than {MAX_TOKENIZER_BYTES} bytes")
        found = msgspec.json.decode(file.read_bytes(), type=_TokenizerFile)
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{file.name} of a model cannot be read: {error}") from error
    vocab = found.model.vocab
    if isinstance(vocab, dict):
        tokens = {token_id: token for token, token_id in vocab.items()}
    else:
        tokens = {token_id: token for token_id, (token, _) in enumerate(vocab)}
    return tokens | {added.id: added.content for added in found.added_tokens}
