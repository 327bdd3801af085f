"""Text to token ids: a model folder's `tokenizer.json` with its special and end-of-sequence tokens.

Ids are those of the Hugging Face stack for the same folder: the post-processor in `tokenizer.json` alone
decides about BOS. Not the way back to text while streaming (`detokenizer`). Used by `service`; thread-safe.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import tokenizers

from penstock.core.errors import CheckpointError, InvalidParameterError
from penstock.text.model_files import has_file, read_bytes, read_object
from penstock.text.token_table import LeadingSpace, TokenTable, make_token_table

NAMED_SPECIAL_TOKENS: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """Encodes text and knows the bytes of every token."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: tuple[int, ...],
    ) -> None:
        """Wrap `backend`; its truncation and padding are switched off.

        Args:
            backend: a loaded tokenizer of the `tokenizers` library; this object owns it from now on.
            special_tokens: `bos_token` and the like to their text, as chat templates see them.
            eos_token_ids: tokens that end an answer, without repetition.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.eos_token_ids = eos_token_ids
        self.table: TokenTable = make_token_table(backend)
        # Read once, here: for 150k tokens that takes some 50 ms, too long for a request.
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = 1 + max(vocabulary.values(), default=-1)
        """One more than the greatest token id, added tokens included."""
        self.max_token_chars: int = max(map(len, vocabulary), default=1)
        """Most characters that one token can take from a text; bounds the number of tokens from below."""

    @classmethod
    def from_folder(cls, path: Path | str) -> "Tokenizer":
        """Load `tokenizer.json` and what belongs to it; runs no code of the folder.

        Raises:
            CheckpointError: a file is missing or broken, or the tokenizer is of an unknown kind.
        """
        folder = Path(path)
        backend = _load_backend(folder)
        settings = read_object(folder / "tokenizer_config.json")
        special_tokens = _named_special_tokens(folder, settings)
        _add_missing_tokens(backend, settings=settings, special_tokens=special_tokens)
        eos_token_ids = _eos_token_ids(folder, backend=backend, special_tokens=special_tokens)
        return cls(backend, special_tokens=special_tokens, eos_token_ids=eos_token_ids)

    @property
    def added_ids_by_text(self) -> dict[str, int]:
        """The added tokens, special ones and others, by what they are written as."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items()}

    def to_json(self) -> str:
        """The whole tokenizer as a `tokenizer.json`, with what was added to it; 11 MB for 150k tokens."""
        text: str = self._backend.to_str()
        return text

    def num_tokens_min(self, text: str) -> int:
        """A lower bound on the tokens of `text`, without encoding it."""
        return -(-len(text) // self.max_token_chars)

    def is_special(self, token_id: int) -> bool:
        """True for tokens that `skip_special_tokens` leaves out."""
        return token_id in self.table.special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that the token stands for; empty for an unknown id."""
        return self.table.token_bytes(token_id)

    def encode(self, text: str, *, add_special_tokens: bool, param: str = "prompt") -> list[int]:
        """Token ids of `text`; releases the interpreter lock while it works.

        Args:
            text: any text; special tokens written in it become those tokens.
            add_special_tokens: let the post-processor add BOS and the like.
            param: the request field that an error names.

        Raises:
            InvalidParameterError: `text` holds a lone surrogate, which is not a character.
        """
        _check_unicode(text, param=param)
        # Of the library's entries only the batch ones release the interpreter lock.
        encodings = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encodings[0].ids
        return ids

    def encode_pair(self, first: str, second: str, *, param: str) -> list[int]:
        """Token ids of two texts, joined as the post-processor joins pairs; else as `encode`."""
        for text in (first, second):
            _check_unicode(text, param=param)
        ids: list[int] = self._backend.encode_batch_fast([(first, second)])[0].ids
        return ids

    def encode_cut(self, text: str, *, limit: int, add_special_tokens: bool, param: str) -> list[int]:
        """The first `limit` token ids of `text`; of those that the post-processor adds all stay if they fit.

        Else as `encode`.
        """
        plain = self.encode(text, add_special_tokens=False, param=param)
        whole = self.encode(text, add_special_tokens=True, param=param) if add_special_tokens else plain
        if len(whole) <= limit:
            return whole
        num_added = len(whole) - len(plain)
        starts = (i for i in range(num_added + 1) if whole[i : i + len(plain)] == plain)
        num_before = next(starts, num_added)
        after = whole[num_before + len(plain) :]
        return [*whole[: max(0, limit - len(after))], *after][:limit]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Text of a whole sequence: its bytes, broken ones as U+FFFD, then the leading-space rule."""
        table = self.table
        kept = [i for i in token_ids if not (skip_special_tokens and i in table.special_ids)]
        pieces = [table.token_bytes(token_id) for token_id in kept]
        if kept and table.leading_space is LeadingSpace.STRIP_FIRST_TOKEN:
            pieces[0] = table.first_token_bytes(kept[0])
        text = b"".join(pieces).decode("utf-8", "replace")
        if table.leading_space is LeadingSpace.STRIP_ONE:
            return text.removeprefix(" ")
        return text


def _check_unicode(text: str, *, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidParameterError(
            f"{param} holds a lone surrogate at character {error.start}, it must be valid Unicode",
            param=param,
        ) from None


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not has_file(path):
        raise CheckpointError(
            f"the model folder {folder.name!r} has no tokenizer.json, "
            "other tokenizer formats are not supported"
        )
    raw = read_bytes(path)
    try:
        return tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:  # noqa: BLE001  # the library raises bare Exception
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(f"tokenizer.json is broken: {reason}") from None


def _token_text(value: object) -> str | None:
    """A special token is written as text or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _named_special_tokens(folder: Path, settings: Mapping[str, object]) -> dict[str, str]:
    legacy = {} if "added_tokens_decoder" in settings else read_object(folder / "special_tokens_map.json")
    extra = settings.get("extra_special_tokens")
    own = {key: text for key, text in settings.items() if key.endswith("_token") and isinstance(text, str)}
    entries = {**settings, **(extra if isinstance(extra, dict) else {}), **legacy}
    keys = dict.fromkeys((*NAMED_SPECIAL_TOKENS, *own, *(extra if isinstance(extra, dict) else ())))
    named = {key: _token_text(entries.get(key)) for key in keys}
    return {key: text for key, text in named.items() if text is not None}


def _add_missing_tokens(
    backend: tokenizers.Tokenizer,
    *,
    settings: Mapping[str, object],
    special_tokens: Mapping[str, str],
) -> None:
    """Add what `tokenizer_config.json` names and `tokenizer.json` lacks, in the order of ids."""
    decoder = settings.get("added_tokens_decoder")
    entries = decoder if isinstance(decoder, dict) else {}
    try:
        ordered = sorted(entries.items(), key=lambda item: int(item[0]))
        tokens = [tokenizers.AddedToken(**entry) for _, entry in ordered]
    except (TypeError, ValueError):
        raise CheckpointError("tokenizer_config.json: added_tokens_decoder is malformed") from None
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([token for token in tokens if token.content not in known])
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    listed = extra if isinstance(extra, list) else []
    names = [*special_tokens.values(), *(text for entry in listed if (text := _token_text(entry)))]
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(text, special=True, normalized=False)
            for text in dict.fromkeys(names)
            if text not in special
        ]
    )


def _eos_token_ids(
    folder: Path, *, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]
) -> tuple[int, ...]:
    """`generation_config.json` decides, else `config.json`; the tokenizer's own eos_token is always one."""
    for name in ("generation_config.json", "config.json"):
        value = read_object(folder / name).get("eos_token_id")
        if value is not None:
            found = _checked_ids(value, name=name)
            break
    else:
        found = []
    named = special_tokens.get("eos_token")
    own = None if named is None else backend.token_to_id(named)
    return tuple(dict.fromkeys(found if own is None else [*found, own]))


def _checked_ids(value: object, *, name: str) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise CheckpointError(
                f"{name}: eos_token_id is {value!r}, it must be a token id or a list of them"
            )
    return list(ids)
