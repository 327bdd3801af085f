"""Draws on a device by the Triton kernels: what the kernels need to know of sequences, in one transfer.

The counts that penalties read are the states' own, at the time of the draw: the step before has been
committed by then, forced tokens included, and a fork has its own state. A draw's penalties go over as a list
of the distinct tokens, 20 bytes each, not as a table of the vocabulary, which the kernels would have to
read as a whole. `runner` makes it.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.engine.sampling.masks import joined
from penstock.engine.sampling.sequence_state import SequenceState
from penstock.engine.sampling.uniform import uniforms
from penstock.engine.sampling.vocabulary import Doubles, Floats, Ints
from penstock.engine.scheduler.constraint import Mask
from penstock.kernels.transfer import upload
from penstock.kernels.triton.sampling import DrawRequest, Edits, draw_tokens

MAX_LOGPROBS: Final = 20
"""Alternatives found on the device, one after the other; a draw that asks for more goes to the host."""
BANNED: Final = 1
SEEN: Final = 2


class TritonSampler:
    """All draws but those with rare filters; a `DeviceSampler`."""

    num_bytes = 0

    def serves(self, state: SequenceState, *, output_idx: int, mask: Mask | None) -> bool:
        """True unless the draw needs its row sorted or asks for very many alternatives."""
        del output_idx, mask
        return not state.is_rare and (state.params.logprobs or 0) <= MAX_LOGPROBS

    def draw(
        self,
        logits: Tensor,
        *,
        rows: Sequence[int],
        states: Sequence[SequenceState],
        output_idxs: Sequence[int],
        masks: Sequence[Mask | None] | None,
    ) -> Tensor:
        """As `DeviceSampler.draw`, for bfloat16 too.

        Raises:
            IndexError: a bias, ban or penalty names a token outside the vocabulary.
        """
        request = self.request(logits, rows=rows, states=states, output_idxs=output_idxs, masks=masks)
        return draw_tokens(logits, request)

    def request(
        self,
        logits: Tensor,
        *,
        rows: Sequence[int],
        states: Sequence[SequenceState],
        output_idxs: Sequence[int],
        masks: Sequence[Mask | None] | None,
    ) -> DrawRequest:
        """What `draw` hands to the kernels, on its way to the device."""
        vocab = logits.shape[1]
        masks = [None] * len(states) if masks is None else masks
        edits = _edits(rows, states=states, output_idxs=output_idxs, masks=masks, vocab=vocab)
        numbers = _numbers(states, output_idxs=output_idxs)
        own = [np.array(rows, np.int64), _places(edits, num_draws=len(states)), numbers]
        sent = own if edits is None else [*own, *edits.arrays]
        arrived = upload([torch.from_numpy(each) for each in sent], device=logits.device)
        asked = [n for state in states if (n := state.params.logprobs) is not None]
        has_p = (numbers[2] < 1.0) & (numbers[0] > 0.0)
        return DrawRequest(
            rows=arrived[0],
            places=arrived[1],
            numbers=arrived[2],
            edits=None if edits is None else _on_device(edits, arrived[3:]),
            is_random=bool(numbers[0].any()),
            has_top_k=bool(((numbers[1] > 0) & (numbers[1] < vocab) & (numbers[0] > 0.0)).any()),
            has_top_p=bool(has_p.any()),
            has_min_p=bool(numbers[3].any()),
            num_top=min(max(asked), vocab) if asked else None,
        )


def _numbers(states: Sequence[SequenceState], *, output_idxs: Sequence[int]) -> Doubles:
    """[6, draws], as `DrawRequest.numbers`."""
    numbers = np.zeros((6, len(states)))
    numbers[:4] = np.array([state.draw_numbers for state in states]).T
    if numbers[0].any():
        numbers[4] = uniforms([state.seed for state in states], output_idxs=list(output_idxs))
    numbers[5] = [state.params.logprobs is not None for state in states]
    return numbers


class _EditArrays(NamedTuple):
    """The tensors of `Edits` on the host, in its order, and which draws they are of."""

    arrays: list[npt.NDArray[np.generic]]
    draws: list[int]
    most_tokens: int


def _on_device(edits: _EditArrays, arrived: Sequence[Tensor]) -> Edits:
    rows, mask_of, masks, offsets, ids, kinds, biases, counts, penalties = arrived
    return Edits(
        rows=rows,
        mask_of=mask_of,
        masks=masks,
        offsets=offsets,
        ids=ids,
        kinds=kinds,
        biases=biases,
        counts=counts,
        penalties=penalties,
        most_tokens=edits.most_tokens,
    )


def _places(edits: _EditArrays | None, *, num_draws: int) -> Ints:
    places = np.full(num_draws, -1, np.int64)
    if edits is not None:
        places[edits.draws] = np.arange(len(edits.draws))
    return places


def _edits(
    rows: Sequence[int],
    *,
    states: Sequence[SequenceState],
    output_idxs: Sequence[int],
    masks: Sequence[Mask | None],
    vocab: int,
) -> _EditArrays | None:
    """None where no draw changes its row."""
    draws, of_masks, lists = [], [], []
    for draw, (state, output_idx, mask) in enumerate(zip(states, output_idxs, masks, strict=True)):
        allowed = joined(mask, state.allowed_mask(vocab))
        if allowed is not None or state.alters_logits(output_idx=output_idx):
            draws.append(draw)
            of_masks.append(allowed)
            lists.append(_token_edits(state, output_idx=output_idx, vocab=vocab))
    if not draws:
        return None
    lengths = [len(each.ids) for each in lists]
    kept = [mask[: -(-vocab // 32)] for mask in of_masks if mask is not None]
    mask_of = np.cumsum([mask is not None for mask in of_masks]) - 1
    mask_of[[mask is None for mask in of_masks]] = -1
    params = [states[draw].params for draw in draws]
    penalties = [(one.repetition_penalty, one.presence_penalty, one.frequency_penalty) for one in params]
    arrays: list[npt.NDArray[np.generic]] = [
        np.array([rows[draw] for draw in draws], np.int64),
        mask_of.astype(np.int64),
        np.array(kept, np.int32) if kept else np.zeros((1, 1), np.int32),
        np.cumsum([0, *lengths], dtype=np.int64),
        # One number where there would be none: an empty array has no address.
        *(np.concatenate([*parts, np.zeros(1, parts[0].dtype)]) for parts in zip(*lists, strict=True)),
        np.array(penalties, np.float32),
    ]
    return _EditArrays(arrays=arrays, draws=draws, most_tokens=max(lengths))


class _TokenEdits(NamedTuple):
    """What happens to single tokens of a row; each token once."""

    ids: Ints
    kinds: npt.NDArray[np.int32]
    biases: Floats
    counts: Floats


def _token_edits(state: SequenceState, *, output_idx: int, vocab: int) -> _TokenEdits:
    params, output = state.params, state.output
    repeats = params.repetition_penalty != 1.0
    counted = output.ids if repeats or params.presence_penalty or params.frequency_penalty else output.ids[:0]
    banned = np.array(state.banned_now(output_idx=output_idx), np.int64)
    added = state.biases()
    biased = np.fromiter(added.keys(), np.int64, len(added))
    ids, places = np.unique(np.concatenate([counted, state.prompt_ids, banned, biased]), return_inverse=True)
    if len(ids) and not 0 <= ids[0] <= ids[-1] < vocab:
        raise IndexError(f"tokens {ids[0]} to {ids[-1]} are changed in a vocabulary of {vocab}")
    of_counted, of_prompt, of_banned, of_biased = np.split(
        places, np.cumsum([len(counted), len(state.prompt_ids), len(banned)])
    )
    edits = _TokenEdits(
        ids=ids,
        kinds=np.zeros(len(ids), np.int32),
        biases=np.zeros(len(ids), np.float32),
        counts=np.zeros(len(ids), np.float32),
    )
    edits.biases[of_biased] = np.fromiter(added.values(), np.float32, len(added))
    edits.counts[of_counted] = output.counts[: len(counted)]
    if repeats:
        edits.kinds[of_counted] |= SEEN
        edits.kinds[of_prompt] |= SEEN
    edits.kinds[of_banned] |= BANNED
    return edits
