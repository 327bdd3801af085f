"""Turns books and conversations into training rows of token ids and targets.

Rows are a pure function of counters (book window number, conversation number), so a resumed
training run continues where it stopped. Targets are the next ids; -1 marks positions without
loss: all of a conversation except what the assistant says.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from tools.embedded import corpus
from tools.embedded.instructions import TRAIN_SEED, Conversation, Message, make_conversation
from tools.embedded.tokenizer import BOS, EOS, SPECIALS

Ids = NDArray[np.int32]
NO_LOSS = -1
COPY_SEED = 99
STORY_REQUESTS = (
    "Continue this story: {t}",
    "Continue the story:\n{t}",
    "Go on with this story: {t}",
    "Please continue: {t}",
    "What happens next? {t}",
    "{t}\n\nContinue the story.",
)
NEW_STORY_REQUESTS = ("Tell me a story.", "Tell a story.", "Please tell me a story.", "A story!")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Ids and targets of one training row, both of the row's length."""

    ids: Ids
    targets: Ids


@dataclass(slots=True, kw_only=True)
class Cursor:
    """Where the data streams stand; saved in the checkpoint. Mutated by `RowSource`."""

    book_window: int = 0
    conversation: int = 0
    row: int = 0
    answer: int = 0


def render_system(conversation: Conversation) -> str:
    """The system turn, as the chat template writes it; empty when there is nothing to say."""
    first = conversation.messages[0]
    system = first["content"] if first["role"] == "system" else ""
    if conversation.tools:
        lines = "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in conversation.tools)
        system += ("\n\n" if system else "") + f"# Tools\n<tools>\n{lines}</tools>\n"
        system += "To call a function, write its name and arguments as JSON in <tool_call></tool_call>."
    return f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""


def _segments(message: Message) -> tuple[tuple[str, bool], ...]:
    role, content = message["role"], message["content"]
    if role == "assistant":
        return (("<|im_start|>assistant\n", False), (f"{content}<|im_end|>", True), ("\n", False))
    if role == "tool":
        content = f"<tool_response>\n{content}\n</tool_response>"
    return ((f"<|im_start|>user\n{content}<|im_end|>\n", False),)


def segments(conversation: Conversation) -> Iterator[tuple[str, bool]]:
    """The rendered text in pieces, each with whether it carries loss."""
    yield BOS + render_system(conversation), False
    for message in conversation.messages:
        if message["role"] != "system":
            yield from _segments(message)


def prompt_text(conversation: Conversation) -> str:
    """What the model sees before it answers the last turn."""
    pieces = [text for text, _ in segments(conversation)]
    return "".join(pieces[:-2])


@dataclass(slots=True, kw_only=True)
class RowSource:
    """Makes rows from the two streams. Owned by the training loop."""

    tokenizer: Tokenizer
    book_ids: Ids  # all training books, each begun with BOS and ended with EOS
    paragraphs: list[str]
    cursor: Cursor
    shares: dict[str, float] | None = None
    story_share: float = 0.04
    copy_size_max: int = 80
    _permutations: dict[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict)

    def book_row(self, length: int) -> Row:
        """The next window of the books: each epoch visits all windows in a new order and phase."""
        num_windows = (len(self.book_ids) - length - 1) // length - 1
        epoch, position = divmod(self.cursor.book_window * 512 // length, num_windows)
        self.cursor.book_window += max(1, length // 512)
        key = (epoch, length)
        if key not in self._permutations:
            self._permutations = {key: np.random.default_rng(key).permutation(num_windows)}
        phase = (epoch * 7919) % length
        start = int(self._permutations[key][position]) * length + phase
        ids = self.book_ids[start : start + length + 1]
        return Row(ids=ids[:-1], targets=ids[1:])

    def copy_row(self, length: int) -> Row:
        """Passages that each come twice, with loss on the second copy alone.

        Half the passages have their tokens shuffled, so only looking back can predict the copy.
        It is how the model learns early to repeat what stands in its context.
        """
        rng = np.random.default_rng((COPY_SEED, self.cursor.row))
        self.cursor.row += 1
        ids: list[NDArray[np.int32]] = []
        targets: list[NDArray[np.int32]] = []
        filled = 0
        while filled <= length:
            size = int(rng.integers(4, self.copy_size_max))
            start = int(rng.integers(0, len(self.book_ids) - size))
            passage = self.book_ids[start : start + size].copy()
            if rng.random() < 0.5:
                rng.shuffle(passage)
            ids += [passage, passage]
            targets += [np.full(size, NO_LOSS, dtype=np.int32), passage]
            filled += 2 * size
        return Row(
            ids=np.concatenate(ids)[:length],
            targets=np.concatenate(targets)[1 : length + 1],
        )

    def chat_row(self, length: int) -> Row:
        """Conversations back to back until the row is full; the last one is cut."""
        ids: list[int] = []
        carries_loss: list[bool] = []
        while len(ids) <= length:
            for text, has_loss in self._next_segments():
                piece = self.tokenizer.encode(text, add_special_tokens=False).ids
                ids.extend(piece)
                carries_loss.extend([has_loss] * len(piece))
        all_ids = np.array(ids[: length + 1], dtype=np.int32)
        keep = np.array(carries_loss[1 : length + 1])
        targets = np.where(keep, all_ids[1:], NO_LOSS).astype(np.int32)
        return Row(ids=all_ids[:-1], targets=targets)

    def _next_segments(self) -> Iterator[tuple[str, bool]]:
        index = self.cursor.conversation
        self.cursor.conversation += 1
        rng = random.Random(f"story:{index}")  # noqa: S311  # a data set, not a secret
        if rng.random() < self.story_share:
            return segments(make_story(rng, self.paragraphs))
        return segments(make_conversation(TRAIN_SEED, index, shares=self.shares))


def make_story(rng: random.Random, paragraphs: Sequence[str]) -> Conversation:
    """A request to tell or continue a story, answered with a passage of a book."""
    start = rng.randrange(len(paragraphs) - 6)
    opening, rest = paragraphs[start], "\n".join(paragraphs[start + 1 : start + 6])
    question = rng.choice(STORY_REQUESTS).format(t=opening[-400:])
    if rng.random() < 0.3:
        question, rest = rng.choice(NEW_STORY_REQUESTS), f"{opening}\n{rest}"
    end = rest.find(". ", 500)
    answer = rest[: end + 1] if end > 0 else rest[:700]
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Conversation(kind="story", messages=messages, wording="", operands="=story")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Prompts with what a model said to them, end to end; loss where the model spoke."""

    ids: Ids
    has_loss: NDArray[np.bool_]

    def row(self, length: int, cursor: Cursor) -> Row:
        """The next window; after the last comes the first, a little later in the text."""
        lap, position = divmod(cursor.answer, (len(self.ids) - length - 1) // length)
        cursor.answer += 1
        start = position * length + (lap * 7919) % length
        ids, kept = self.ids[start : start + length + 1], self.has_loss[start + 1 : start + length + 1]
        return Row(ids=ids[:-1], targets=np.where(kept, ids[1:], NO_LOSS).astype(np.int32))

    def write(self, path: Path) -> None:
        """Save as safetensors."""
        save_file({"ids": self.ids, "has_loss": self.has_loss}, path)

    @classmethod
    def read(cls, *paths: Path) -> Self:
        """What `write` saved, of several files end to end."""
        saved = [load_file(path) for path in paths]
        return cls(**{name: np.concatenate([one[name] for one in saved]) for name in ("ids", "has_loss")})


def encode_books(tokenizer: Tokenizer, corpus_dir: Path) -> Ids:
    """All training books in one array; takes some seconds."""
    bos, eos = SPECIALS.index(BOS), SPECIALS.index(EOS)
    ids: list[int] = []
    for book in corpus.training_books(corpus_dir):
        ids.extend((bos, *tokenizer.encode(book, add_special_tokens=False).ids, eos))
    return np.array(ids, dtype=np.int32)


def cached_books(tokenizer: Tokenizer, corpus_dir: Path, cache: Path) -> Ids:
    """As `encode_books`, kept in a file; remove it when books or tokenizer change."""
    if cache.exists():
        ids: Ids = np.load(cache)
        return ids
    ids = encode_books(tokenizer, corpus_dir)
    np.save(cache, ids)
    return ids


def encode_held_out(tokenizer: Tokenizer, corpus_dir: Path) -> Ids:
    """The held-out book, without BOS and EOS."""
    text = corpus.held_out_book(corpus_dir)
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)


def load_paragraphs(corpus_dir: Path) -> list[str]:
    """Paragraphs of the training books that are long enough to be prose."""
    lines = (line for book in corpus.training_books(corpus_dir) for line in book.splitlines())
    return [line for line in lines if len(line) > 60]
