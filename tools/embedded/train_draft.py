"""Trains the draft of the embedded model: a small network that says what the large one would say next.

It is distilled: its loss is the divergence of its next-token distribution from the target's, at every
position that carries loss, on the target's own training data and, with `--answers`, on what the target
itself said (`answers.py`), which is what a draft is asked to foretell. Rows, schedule and checkpoints are
those of `train.py`.

**Source:** Zhou et al., DistillSpec (2023), sections 3 and 4.1: forward divergence, data of the target's own.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tools.embedded import data
from tools.embedded.model import LanguageModel, ModelConfig
from tools.embedded.team import Team
from tools.embedded.train import Control, Trainer, argument_parser, train

DRAFT_CONFIG = ModelConfig(
    hidden_size=192,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
)


PIECE = 256  # places whose scores are held at once


def load_target(folder: Path) -> LanguageModel:
    """The exported target with its bfloat16 weights; it is never changed."""
    target = LanguageModel(ModelConfig())
    target.load_state_dict(load_file(folder / "model.safetensors"))
    return target.bfloat16().requires_grad_(requires_grad=False)


def principal_embedding(embedding_vd: Tensor, size: int) -> Tensor:
    """The target's embedding turned to its `size` principal directions, `[vocab, size]` float32."""
    wide = embedding_vd.float()
    _, _, directions_dd = torch.linalg.svd(wide, full_matrices=False)
    turned: Tensor = wide @ directions_dd[:size].T
    return turned


class HeadDivergence(torch.autograd.Function):
    """Mean cross-entropy of the draft under the target's distribution, heads included, in small pieces.

    It is the divergence and a constant. Its gradient is known, so the forward pass computes it piece by
    piece, while the scores are in the cache; scores of all places at once would be most of the memory.
    """

    @staticmethod
    def forward(ctx: Any, hidden_td: Tensor, head_vd: Tensor, said_te: Tensor, target_ve: Tensor) -> Tensor:
        """Hidden states and output heads of the draft, then of the target. Any: torch's context."""
        count = max(1, len(hidden_td))
        head = head_vd.to(hidden_td.dtype)
        hidden_gradient, head_gradient = torch.empty_like(hidden_td), torch.zeros_like(head_vd)
        loss = torch.zeros((), device=hidden_td.device)
        for start in range(0, len(hidden_td), PIECE):
            piece = slice(start, start + PIECE)
            wanted = (said_te[piece] @ target_ve.T).float().softmax(-1)
            logged = (hidden_td[piece] @ head.T).float().log_softmax(-1)
            loss -= (wanted * logged).sum() / count
            gradient = ((logged.exp_() - wanted) / count).to(head.dtype)
            hidden_gradient[piece] = gradient @ head
            head_gradient += gradient.T @ hidden_td[piece]
        ctx.save_for_backward(hidden_gradient, head_gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the draft's hidden states and head. Any: torch's context."""
        hidden_gradient, head_gradient = ctx.saved_tensors
        return hidden_gradient * outputs[0].to(hidden_gradient.dtype), head_gradient * outputs[0], None, None


class DraftTrainer(Trainer):
    """A `Trainer` whose targets are distributions."""

    def __init__(self, arguments: argparse.Namespace, team: Team) -> None:
        self.target = load_target(arguments.target).to(arguments.device)
        super().__init__(arguments, team)
        self.answers = data.Answers.read(*arguments.answers) if arguments.answers else None

    def new_model(self) -> LanguageModel:
        """A draft that starts from the target's embedding."""
        model = LanguageModel(DRAFT_CONFIG)
        embedding = principal_embedding(self.target.model.embed_tokens.weight, DRAFT_CONFIG.hidden_size)
        model.model.embed_tokens.weight.data.copy_(embedding)
        return model

    def row(self, dice: float, control: Control, length: int) -> data.Row:
        """The target's own answers take the upper end of the dice."""
        if self.answers is not None and dice >= 1 - control.answer_share:
            return self.answers.row(length, self.rows.cursor)
        return super().row(dice, control, length)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The divergence where targets are not -1; what they are does not matter."""
        kept = (targets.flatten() >= 0).nonzero()[:, 0]
        with torch.no_grad():
            said = self.target.model(ids).flatten(0, 1)[kept]
        hidden, head = self.model.model(ids).flatten(0, 1)[kept], self.model.model.embed_tokens.weight
        target_head = self.target.model.embed_tokens.weight
        loss: Tensor = HeadDivergence.apply(hidden, head, said, target_head)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return loss


def main() -> None:
    """Train the draft from the command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--target", type=Path, default=Path("penstock/models/embedded"))
    parser.add_argument("--answers", type=Path, nargs="+", help="of the target, as `answers.py` writes them")
    train(DraftTrainer, parser.parse_args())


if __name__ == "__main__":
    main()
