"""Rows and checkpoints of the embedded model's training, on tiny sizes."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from tools.embedded import checkpoint
from tools.embedded.average import average
from tools.embedded.data import NO_LOSS, Cursor, RowSource
from tools.embedded.model import LanguageModel, ModelConfig, causal_attention
from tools.embedded.optimizer import make_optimizers
from tools.embedded.team import Team
from tools.embedded.train import Control

TINY = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
)

OTHER = replace(TINY, num_hidden_layers=2)


@pytest.fixture
def rows() -> RowSource:
    """A source over a made-up book whose ids count up, and a tokenizer of bytes."""
    alphabet = {letter: number for number, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    book_ids = np.arange(20_000, dtype=np.int32)
    return RowSource(tokenizer=tokenizer, book_ids=book_ids, paragraphs=["a" * 100] * 20, cursor=Cursor())


def test_book_targets_are_the_next_ids(rows: RowSource) -> None:
    """Every position of a book row carries loss."""
    row = rows.book_row(512)
    assert (row.targets == row.ids + 1).all()


def test_an_epoch_of_book_rows_repeats_no_window(rows: RowSource) -> None:
    """Windows of one epoch are distinct."""
    starts = [int(rows.book_row(512).ids[0]) for _ in range(30)]
    assert len(set(starts)) == 30


def test_copy_rows_carry_loss_on_the_second_copy_alone(rows: RowSource) -> None:
    """Whatever carries loss stood in the row before."""
    row = rows.copy_row(512)
    assert len(row.ids) == len(row.targets) == 512
    for position in np.flatnonzero(row.targets != NO_LOSS):
        assert row.targets[position] in row.ids[: position + 1]


def test_chat_targets_are_next_ids_or_nothing(rows: RowSource) -> None:
    """Assistant text carries loss; the rest is marked."""
    row = rows.chat_row(512)
    kept = np.flatnonzero(row.targets[:-1] != NO_LOSS)
    assert 0 < len(kept) < 511
    assert (row.targets[kept] == row.ids[kept + 1]).all()


def test_blocked_attention_equals_the_plain_one() -> None:
    """Over lengths on both sides of a block edge."""
    for length in (5, 128, 200):
        q, k, v = torch.randn(3, 1, 2, length, 8).unbind(0)
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(causal_attention(q, k, v), plain)


def test_a_checkpoint_restores_weights_and_optimizer_state(tmp_path: Path) -> None:
    """A resumed run takes the very step that the saved one would have taken."""
    ids = torch.randint(0, 32, (2, 16))
    runs = []
    for _ in range(2):
        model = LanguageModel(TINY)
        runs.append((model, make_optimizers(model, Team())))
    (model, optimizers), (other, other_optimizers) = runs
    _step(model, optimizers, ids)
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.write(path, model=model, optimizers=optimizers, progress={"step": 1})
    saved = checkpoint.read(path)
    checkpoint.restore(saved, model=other, optimizers=other_optimizers)
    for each in ((model, optimizers), (other, other_optimizers)):
        _step(*each, ids)
    assert saved.progress == {"step": 1}
    for weight, restored in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, restored)


def _step(model: LanguageModel, optimizers: checkpoint.Optimizers, ids: torch.Tensor) -> None:
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
        optimizer.zero_grad()


def test_tokens_end_a_run_whatever_the_time() -> None:
    """The rate rises from where the run was taken up, stays, and falls to zero at the last token."""
    control = Control(end_tokens=1000, decay_tokens=400, learning_rate=1.0, warmup_from=10, warmup_steps=4)
    now = datetime.now().astimezone()
    assert control.rate(9, control.decay_left(now, 0)) == 0
    assert control.rate(10, control.decay_left(now, 0)) == 0.25
    assert control.rate(20, control.decay_left(now, 500)) == 1.0
    assert control.rate(20, control.decay_left(now, 800)) == 0.5
    assert control.decay_left(now, 1000) == 0
    assert Control().decay_left(now, 10**12) == float("inf")


def test_the_mean_of_two_checkpoints_lies_between_them(tmp_path: Path) -> None:
    """Weights by their share; counters of the later one; another network is refused."""
    models = [LanguageModel(TINY), LanguageModel(TINY)]
    for number, model in enumerate(models):
        progress = {"step": number}
        checkpoint.write(tmp_path / f"{number}", model=model, optimizers=[], progress=progress)
    average(tmp_path / "0", tmp_path / "1", tmp_path / "mean", share=0.25)
    mean = checkpoint.read(tmp_path / "mean")
    assert mean.progress == {"step": 1}
    for name, weight in mean.weights.items():
        first, second = (dict(model.named_parameters())[name] for model in models)
        torch.testing.assert_close(weight, 0.75 * first + 0.25 * second)
    checkpoint.write(tmp_path / "other", model=LanguageModel(OTHER), optimizers=[], progress={})
    with pytest.raises(ValueError, match="not checkpoints of one network"):
        average(tmp_path / "0", tmp_path / "other", tmp_path / "mean", share=0.5)
