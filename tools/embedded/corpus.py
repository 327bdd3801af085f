"""Reads the public-domain books: 36 to train on and one that is kept for the perplexity figure."""

from pathlib import Path

HELD_OUT_BOOK = "03454.txt"


def training_books(corpus_dir: Path) -> list[str]:
    """The text of every book but the held-out one, in file-name order."""
    paths = sorted(path for path in corpus_dir.glob("*.txt") if path.name != HELD_OUT_BOOK)
    if not paths:
        raise FileNotFoundError(f"{corpus_dir}: no books (*.txt) here")
    return [path.read_text(encoding="utf-8") for path in paths]


def held_out_book(corpus_dir: Path) -> str:
    """The text of the book that training never reads."""
    return (corpus_dir / HELD_OUT_BOOK).read_text(encoding="utf-8")
