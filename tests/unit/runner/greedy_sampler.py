"""The plainest `DeviceSampler`: greedy draws in a few operations of torch, all others it leaves to the host.

The runner's tests draw with it where results come by a queue: both ways are taken, and no kernels are needed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.engine.sampling.ports import DrawStatus
from penstock.engine.sampling.sequence_state import SequenceState
from penstock.engine.scheduler.constraint import Mask
from penstock.kernels.transfer import indices


class GreedySampler:
    """The highest logit, lowest id among equals; a `DeviceSampler`."""

    num_bytes = 0

    def serves(self, state: SequenceState, *, output_idx: int, mask: Mask | None) -> bool:
        """True for a greedy choice among untouched logits that nobody asks about."""
        params = state.params
        is_plain = params.is_greedy and params.logprobs is None and not state.is_rare
        return is_plain and mask is None and not state.alters_logits(output_idx=output_idx)

    def draw(
        self,
        logits: Tensor,
        *,
        rows: Sequence[int],
        states: Sequence[SequenceState],
        output_idxs: Sequence[int],
        masks: Sequence[Mask | None] | None,
    ) -> Tensor:
        """As `DeviceSampler.draw`."""
        del states, output_idxs, masks
        part = (
            logits if list(rows) == list(range(len(logits))) else logits[indices(rows, device=logits.device)]
        )
        vocab = part.shape[1]
        highest = part.amax(dim=1)
        ids = torch.arange(vocab, dtype=torch.int32, device=part.device)
        # Not argmax, which may name any of several equals on a device.
        tokens = torch.where(part == highest[:, None], ids, vocab - 1).amin(dim=1).long()
        status = torch.where(highest.isfinite(), int(DrawStatus.DRAWN), int(DrawStatus.NOT_FINITE))
        nothing = torch.zeros_like(tokens)
        return torch.stack([tokens, status, nothing, nothing], dim=1).double()
