"""Training of the draft: its loss, its data and how its use is counted."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the name everyone reads

from tools.embedded.agreement import tokens_per_round
from tools.embedded.answers import Answer, join
from tools.embedded.data import NO_LOSS, Answers, Cursor
from tools.embedded.train_draft import HeadDivergence, principal_embedding


def test_the_loss_in_pieces_equals_the_plain_one() -> None:
    """Value and both gradients, over more places than one piece holds."""
    torch.manual_seed(0)
    said, target_head = torch.randn(600, 24), torch.randn(40, 24)
    hidden, head = torch.randn(600, 12, requires_grad=True), torch.randn(40, 12, requires_grad=True)
    wanted = (said @ target_head.T).softmax(-1)
    plain = F.cross_entropy(hidden @ head.T, wanted)
    pieces = HeadDivergence.apply(hidden, head, said, target_head)
    torch.testing.assert_close(pieces, plain)
    expected = torch.autograd.grad(3 * plain, (hidden, head))
    torch.testing.assert_close(torch.autograd.grad(3 * pieces, (hidden, head)), expected)


def test_the_principal_embedding_keeps_what_fits() -> None:
    """An embedding of two directions keeps every product of two tokens in two dimensions."""
    flat = torch.randn(30, 2) @ torch.randn(2, 8)
    turned = principal_embedding(flat, 2)
    torch.testing.assert_close(turned @ turned.T, flat @ flat.T, rtol=1e-3, atol=1e-3)


def test_answers_carry_loss_where_the_model_spoke(tmp_path: Path) -> None:
    """Through a file and back; windows follow each other and begin again a little later."""
    said = [Answer(prompt=(1, 2, 3), said=tuple(range(10, 20)))] * 30
    join(said).write(tmp_path / "a.safetensors")
    answers = Answers.read(tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    assert len(answers.ids) == 2 * 30 * 13
    cursor = Cursor()
    rows = [answers.row(64, cursor) for _ in range(40)]
    assert cursor.answer == 40
    for row in rows:
        kept = row.targets != NO_LOSS
        assert (row.targets[kept] >= 10).all()
        assert (row.targets[:-1][kept[:-1]] == row.ids[1:][kept[:-1]]).all()
        assert (row.ids[1:][~kept[:-1]] < 10).all()
    assert not np.array_equal(rows[0].ids, rows[12].ids)


def test_rounds_are_counted_as_a_server_would() -> None:
    """All drafts right: k + 1 a round; none right: 1; the first token comes from the prompt."""
    assert tokens_per_round([True] * 13, 3) == (12, 3)
    assert tokens_per_round([False] * 13, 3) == (12, 12)
    assert tokens_per_round([False, True, True, False, True], 4) == (4, 2)
    assert tokens_per_round([True], 4) == (0, 0)
