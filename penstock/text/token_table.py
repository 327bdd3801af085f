"""The exact bytes of every token: the detokenizer's only view of a vocabulary.

Two kinds of vocabulary are known. *Byte-level* ones spell each byte as a printable character. *Metaspace*
ones (SentencePiece style) write a space as U+2581 and bytes without a token of their own as `<0xNN>`. What
a decoder in `tokenizer.json` does beyond that is refused by name. Tables fill lazily, one token at a time,
so a vocabulary of 150k tokens costs nothing at start and at most one entry per token later.
"""

import enum
import json
import re
from collections.abc import Callable
from typing import Final

import tokenizers

from penstock.core.errors import CheckpointError

METASPACE: Final = "\u2581"
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_KNOWN: Final = "ByteLevel, Metaspace, and sequences of Replace, ByteFallback, Fuse and Strip"


class LeadingSpace(enum.Enum):
    """What a decoder does to the space at the very start of a text."""

    KEEP = enum.auto()
    STRIP_ONE = enum.auto()
    """Removes one space from the start of the whole text."""
    STRIP_FIRST_TOKEN = enum.auto()
    """Removes every metaspace mark of the first token."""


def byte_level_alphabet() -> dict[str, int]:
    """Maps the 256 printable stand-ins of byte-level BPE to their bytes.

    Printable latin-1 characters stand for themselves; the other 68 bytes get U+0100 onward in order.

    **Source:** Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.2.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if chr(byte) not in alphabet)
    return alphabet | {chr(0x100 + order): byte for order, byte in enumerate(hidden)}


class TokenTable:
    """Bytes, text and kind of each token id; asks the vocabulary once per id."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        is_byte_level: bool,
        has_byte_fallback: bool,
        leading_space: LeadingSpace,
    ) -> None:
        self.leading_space = leading_space
        self._tokenizer = tokenizer
        self._added = {i: t.content for i, t in tokenizer.get_added_tokens_decoder().items()}
        self.special_ids = frozenset(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special)
        self._alphabet = byte_level_alphabet()
        self._has_byte_fallback = has_byte_fallback
        self._spell: Callable[[str], bytes] = self._byte_level if is_byte_level else self._metaspace
        self._is_byte_level = is_byte_level
        self.bytes_by_id: dict[int, bytes] = {}
        """Cache, at most one entry per token of the vocabulary."""
        self.text_by_id: dict[int, str | None] = {}
        """Cache: the text of tokens that are whole UTF-8 characters, None for the others."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes the token stands for; empty for an id that the vocabulary does not hold."""
        found = self.bytes_by_id.get(token_id)
        return self._fill(token_id) if found is None else found

    def first_token_bytes(self, token_id: int) -> bytes:
        """`token_bytes` of the first token of a text under `LeadingSpace.STRIP_FIRST_TOKEN`."""
        token = self._tokenizer.id_to_token(token_id)
        return b"" if token is None else self._spell(token.replace(METASPACE, ""))

    def _fill(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            # Not cached: ids outside the vocabulary are without number.
            return b""
        spelled = self._spelled(token_id, token)
        self.bytes_by_id[token_id] = spelled
        try:
            self.text_by_id[token_id] = spelled.decode()
        except UnicodeDecodeError:
            self.text_by_id[token_id] = None
        return spelled

    def _spelled(self, token_id: int, token: str) -> bytes:
        # Added tokens of a byte-level vocabulary are plain text; in a metaspace one the decoder
        # treats them like all others (Gemma's runs of spaces are added tokens).
        if self._is_byte_level and token_id in self._added:
            return self._added[token_id].encode()
        return self._spell(token)

    def _byte_level(self, token: str) -> bytes:
        alphabet = self._alphabet
        try:
            return bytes(alphabet[char] for char in token)
        except KeyError:
            return token.encode()

    def _metaspace(self, token: str) -> bytes:
        if self._has_byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes((int(match[1], 16),))
        return token.replace(METASPACE, " ").encode()


def make_token_table(tokenizer: tokenizers.Tokenizer) -> TokenTable:
    """Read the decoder of `tokenizer` and build the matching table.

    Raises:
        CheckpointError: the decoder is of a kind that is not known here.
    """
    parts = _decoder_parts(tokenizer)
    kinds = [str(part.get("type")) for part in parts]
    if kinds == ["ByteLevel"]:
        return TokenTable(
            tokenizer, is_byte_level=True, has_byte_fallback=False, leading_space=LeadingSpace.KEEP
        )
    if kinds == ["Metaspace"]:
        never = parts[0].get("prepend_scheme") == "never"
        leading = LeadingSpace.KEEP if never else LeadingSpace.STRIP_FIRST_TOKEN
        return TokenTable(tokenizer, is_byte_level=False, has_byte_fallback=False, leading_space=leading)
    _check_sequence(parts)
    leading = LeadingSpace.STRIP_ONE if "Strip" in kinds else LeadingSpace.KEEP
    return TokenTable(
        tokenizer,
        is_byte_level=False,
        has_byte_fallback="ByteFallback" in kinds,
        leading_space=leading,
    )


def _decoder_parts(tokenizer: tokenizers.Tokenizer) -> list[dict[str, object]]:
    if tokenizer.decoder is None:
        raise CheckpointError(f"tokenizer.json has no decoder; known are {_KNOWN}")
    decoder = json.loads(tokenizer.decoder.__getstate__())
    parts: list[dict[str, object]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return parts


def _check_sequence(parts: list[dict[str, object]]) -> None:
    expected: dict[str, dict[str, object]] = {
        "Replace": {"pattern": {"String": METASPACE}, "content": " "},
        "ByteFallback": {},
        "Fuse": {},
        "Strip": {"content": " ", "start": 1, "stop": 0},
    }
    kinds = [str(part.get("type")) for part in parts]
    in_order = kinds == [kind for kind in expected if kind in kinds] and kinds[:1] == ["Replace"]
    for part in parts:
        want = expected.get(str(part.get("type")), {"type": "none"})
        in_order = in_order and all(part.get(key) == value for key, value in want.items())
    if not in_order:
        raise CheckpointError(f"tokenizer.json has the decoder {'+'.join(kinds)}; known are {_KNOWN}")
