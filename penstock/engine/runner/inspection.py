"""A look at what a pass computed: who is sound, and what was asked of the prompts.

`forward` calls it. On a device it waits for the result only where the host needs it now.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from penstock.engine.runner.forward_pass import ForwardPass, are_sound
from penstock.engine.runner.pooling import overflowing, pool
from penstock.engine.runner.prompt_scores import prompt_logprobs
from penstock.engine.scheduler.plan import ScheduledSequence
from penstock.kernels.ops import not_finite, rows_not_finite
from penstock.models.interface import LoadedModel


class Inspection:
    """See the module; keeps nothing between passes."""

    def __init__(self, loaded: LoadedModel) -> None:
        """Take what looks.

        Args:
            loaded: its kernels find rows that are not finite, its head scores prompts.
        """
        self._model = loaded.model
        self._kernels = loaded.kernels
        self._is_queued = loaded.is_queued

    def look_at(
        self,
        sequences: Sequence[ScheduledSequence],
        *,
        hidden: torch.Tensor,
        ends: Sequence[int],
        logits: torch.Tensor,
        bad_rows: torch.Tensor | None = None,
    ) -> ForwardPass:
        """The pass with all that is known of it.

        Args:
            sequences: what was computed.
            hidden: [rows, hidden_size]
            ends: for each sequence one past its last row.
            logits: of the rows that draw.
            bad_rows: [rows] bool, where the pass has found them itself.
        """
        if self._is_queued and bad_rows is None:
            bad_rows = not_finite(self._kernels, hidden)
        done = ForwardPass(sequences=sequences, ends=ends, is_sound=None, bad_rows=bad_rows, logits=logits)
        if bad_rows is not None and not any(_needs_host(seq) for seq in sequences):
            return done
        is_sound = are_sound(rows_not_finite(self._kernels, hidden), ends)
        return self._with_prompts(replace(done, is_sound=is_sound), is_sound=is_sound, hidden=hidden)

    def _with_prompts(
        self, done: ForwardPass, *, is_sound: Sequence[bool], hidden: torch.Tensor
    ) -> ForwardPass:
        """Vectors and logprobs of the prompts that ask for them; a vector that overflows makes unsound."""
        asking = [
            (seq, end)
            for seq, end, ok in zip(done.sequences, done.ends, is_sound, strict=True)
            if (seq.prompt_targets or seq.pooling is not None) and ok
        ]
        if not asking:
            return done
        pools = pool(asking, hidden=hidden, logits=self._model.logits)
        bad = overflowing(pools)
        return replace(
            done,
            is_sound=[ok and seq.seq_id not in bad for ok, seq in zip(is_sound, done.sequences, strict=True)],
            prompt_logprobs=prompt_logprobs(
                [(seq, end) for seq, end in asking if seq.seq_id not in bad],
                hidden=hidden,
                logits=self._model.logits,
                vocab=self._model.vocab_size,
            ),
            pools=[part for part in pools if part.seq_id not in bad],
        )


def _needs_host(seq: ScheduledSequence) -> bool:
    """True if the host looks at the sequence's rows before the step is collected."""
    return seq.pooling is not None or bool(seq.prompt_targets) or bool(seq.num_drafts)
