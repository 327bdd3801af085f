"""From a step's logits to its tokens; the one place where all that shapes a choice is put in order.

```
raw logits [rows, vocab] float32
  1  a row with NaN, or without a finite maximum, ends here
  2  bitmask                     tokens that the grammar forbids, or that `allowed_token_ids` leaves out
  3  min_tokens, bad_words       end-of-sequence and stop ids, too early; ends of banned sequences
  4  logit_bias                  added; what DRY takes away is subtracted
  5  repetition, then frequency and presence penalties
  6  temperature 0: the highest logit, lowest id among equals; no softmax
     otherwise: temperature, top-k, top-p, min-p, then one draw (see `draw`), or with filters that are asked
     for rarely the order of `rare_filters`
  7  logprobs                    of the raw logits
```

A row's token depends on its own logits, parameters, seed and history, on no neighbour. `Sampler.sample`
changes nothing, neither logits nor states, so that it can be repeated; `commit` is what counts tokens.
The runner calls both.

Given a `HostSampler` (see `ports`), steps 1 to 7 run there, in the same order and with the same result but
for the rounding of float32 (see `native_sampler`); without one, here.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from penstock.core.ids import SequenceId
from penstock.core.text import TokenLogprobs
from penstock.engine.sampling.constraints import add_bias, apply_bitmask, ban_tokens
from penstock.engine.sampling.draw import DrawParams, draw
from penstock.engine.sampling.logprobs import token_logprobs
from penstock.engine.sampling.penalties import penalise_presence_and_frequency, penalise_repetition
from penstock.engine.sampling.ports import Draws, DrawStatus, HostSampler
from penstock.engine.sampling.rare_filters import draw_rare
from penstock.engine.sampling.sequence_state import SequenceState, SequenceStates
from penstock.engine.sampling.uniform import uniforms
from penstock.engine.sampling.vocabulary import Floats, Ints
from penstock.engine.scheduler.constraint import Mask
from penstock.engine.scheduler.plan import (
    ForcedTokens,
    NewSequence,
    SampledToken,
    SampleSpec,
    SequenceFailure,
)

if TYPE_CHECKING:  # the extension is not there on every machine
    from penstock.kernels.cpu import _native

XTC_STREAM: Final = 0x5851F42D4C957F2D
"""Makes of a sequence's seed that of a second stream of numbers."""
CHUNK_ELEMENTS: Final = 1 << 16
"""Logits worked on at a time (256 KiB, or one row): temporaries stay in a core's cache and are small enough
that the allocator keeps their pages; a fresh page costs more than all arithmetic on it."""

Outcome = SampledToken | SequenceFailure


class Sampler:
    """Chooses tokens for the sequences it has been told of."""

    def __init__(self, *, native: HostSampler | None = None) -> None:
        """Know nobody yet.

        Args:
            native: makes the passes over the vocabulary faster (in C++, on the threads that run the model);
                None makes them with numpy.
        """
        self._native = native
        self._states = SequenceStates()

    @property
    def num_bytes(self) -> int:
        """Bytes that stay allocated between steps, about."""
        return self._states.num_bytes + (self._native.num_bytes if self._native else 0)

    @property
    def num_sequences(self) -> int:
        """Sequences remembered."""
        return len(self._states)

    def add(self, new_sequences: Iterable[NewSequence]) -> None:
        """Meet sequences (also forks) before their first sample."""
        self._states.add(new_sequences)

    def forget(self, seq_ids: Iterable[SequenceId]) -> None:
        """Drop what is remembered of finished sequences."""
        self._states.forget(seq_ids)

    def state(self, seq_id: SequenceId) -> SequenceState:
        """What is remembered of a sequence; only read."""
        return self._states[seq_id]

    def is_free_of_history(self, seq_id: SequenceId) -> bool:
        """True if the tokens of an answer do not change how its later ones are drawn."""
        return self._states[seq_id].is_free_of_history

    def sample(
        self,
        logits: Floats,
        *,
        specs: Sequence[SampleSpec],
        rows: Sequence[int] | None = None,
        masks: Sequence[Mask | None] | None = None,
    ) -> list[Outcome]:
        """Choose one token per spec; changes nothing.

        Args:
            logits: [num_rows, vocab] float32, C-contiguous, on the host.
            specs: who draws.
            rows: which row of `logits` each spec draws from, repeats allowed; None gives each its own.
            masks: [len(specs)], the tokens that each may draw, or None where it may draw any; None where all
                may.

        Returns:
            For each spec its token, or a failure for a row that has no answer.
        """
        own_rows = list(range(len(logits)))
        rows = own_rows if rows is None else rows
        assert len(rows) == len(specs), (len(rows), len(specs))
        if self._native:
            return self._sample_natively(self._native, logits, specs=specs, rows=rows, masks=masks)
        # The usual case, one draw per row, must not copy the batch's logits.
        part = logits if rows == own_rows else logits[list(rows)]
        return self._sample_in_chunks(part, specs=specs, masks=masks)

    def prepare(self, specs: Sequence[SampleSpec], *, vocab: int) -> "_native.PreparedDraws | None":
        """What `sample` without masks would draw, spec i from row i of logits that a native pass will give.

        Changes nothing; until they are read nothing else may be prepared.

        Args:
            specs: who draws.
            vocab: columns of the logits.

        Returns:
            For the pass, after which `prepared_outcomes` reads them; None where `sample` must do it.
        """
        if self._native is None:
            return None
        states = [self._states[spec.seq_id] for spec in specs]
        if any(state.is_rare for state in states):
            return None
        output_idxs = [spec.output_idx for spec in specs]
        return self._native.prepare(states=states, output_idxs=output_idxs, vocab=vocab)

    def prepared_outcomes(self, specs: Sequence[SampleSpec]) -> list[Outcome]:
        """What the prepared draws of `specs` gave, as `sample` answers."""
        assert self._native is not None, "somebody has prepared them"
        return outcomes_of(self._native.prepared_draws(), specs=specs)

    def _sample_natively(
        self,
        native: HostSampler,
        logits: Floats,
        *,
        specs: Sequence[SampleSpec],
        rows: Sequence[int],
        masks: Sequence[Mask | None] | None,
    ) -> list[Outcome]:
        states = [self._states[spec.seq_id] for spec in specs]
        rare = [draw for draw, state in enumerate(states) if state.is_rare]
        if rare:
            return self._sample_mixed(native, logits, specs=specs, rows=rows, masks=masks, rare=rare)
        output_idxs = [spec.output_idx for spec in specs]
        draws = native.sample(logits, rows=rows, states=states, output_idxs=output_idxs, masks=masks)
        return outcomes_of(draws, specs=specs)

    def _sample_mixed(
        self,
        native: HostSampler,
        logits: Floats,
        *,
        specs: Sequence[SampleSpec],
        rows: Sequence[int],
        masks: Sequence[Mask | None] | None,
        rare: Sequence[int],
    ) -> list[Outcome]:
        """Draws with rare filters go through numpy, the others through the extension; ordered as `specs`."""
        usual = sorted(set(range(len(specs))) - set(rare))

        def part(draws: Sequence[int]) -> tuple[list[SampleSpec], list[int], list[Mask | None] | None]:
            chosen = None if masks is None else [masks[i] for i in draws]
            return [specs[i] for i in draws], [rows[i] for i in draws], chosen

        outcomes: dict[int, Outcome] = {}
        if usual:
            one, own, chosen = part(usual)
            drawn = self._sample_natively(native, logits, specs=one, rows=own, masks=chosen)
            outcomes.update(zip(usual, drawn, strict=True))
        one, own, chosen = part(rare)
        drawn = self._sample_in_chunks(logits[own], specs=one, masks=chosen)
        outcomes.update(zip(rare, drawn, strict=True))
        return [outcomes[draw] for draw in range(len(specs))]

    def _sample_in_chunks(
        self, logits: Floats, *, specs: Sequence[SampleSpec], masks: Sequence[Mask | None] | None
    ) -> list[Outcome]:
        states = [self._states[spec.seq_id] for spec in specs]
        chunk = max(1, CHUNK_ELEMENTS // max(1, logits.shape[1]))
        outcomes: list[Outcome] = []
        for start in range(0, len(specs), chunk):
            part = slice(start, start + chunk)
            rows = _Rows(logits[part], specs=specs[part], states=states[part])
            outcomes.extend(rows.sample(None if masks is None else masks[part]))
        return outcomes

    def commit(self, tokens: Iterable[SampledToken]) -> None:
        """Count tokens that are now part of their answers."""
        for token in tokens:
            self._states[token.seq_id].commit(token.token_id)

    def commit_forced(self, forced: Iterable[ForcedTokens]) -> None:
        """Count tokens that answers gained without a draw; sequences that have been forgotten are ignored."""
        for gained in forced:
            if gained.seq_id in self._states:
                self._states[gained.seq_id].commit_forced(gained.token_ids)


class _Rows:
    """A few rows on their way through the order above."""

    def __init__(self, raw: Floats, *, specs: Sequence[SampleSpec], states: Sequence[SequenceState]) -> None:
        self._raw = raw
        self._logits = raw
        self._specs = specs
        self._states = states
        self._best: Ints = raw.argmax(axis=1)
        self._highest: Floats = raw[np.arange(len(raw)), self._best]
        self._is_sound = np.isfinite(self._highest)

    def sample(self, masks: Sequence[Mask | None] | None) -> list[Outcome]:
        """Steps 1 to 7 for these rows."""
        self._alter([None] * len(self._specs) if masks is None else masks)
        tokens = self._choose()
        return [self._outcome(row, token_id=token_id) for row, token_id in enumerate(tokens.tolist())]

    def _alter(self, masks: Sequence[Mask | None]) -> None:
        """Steps 2 to 5, on a copy of the rows that need them."""
        altered = [
            mask is not None or state.alters_logits(output_idx=spec.output_idx)
            for state, spec, mask in zip(self._states, self._specs, masks, strict=True)
        ]
        rows = np.flatnonzero(np.array(altered) & self._is_sound)
        if not len(rows):
            return
        self._logits = self._raw.copy()
        for row in rows.tolist():
            if (mask := masks[row]) is not None:
                apply_bitmask(self._logits[row], mask=mask)
            alter_row(self._logits[row], state=self._states[row], output_idx=self._specs[row].output_idx)
        self._best[rows] = self._logits[rows].argmax(axis=1)
        self._highest[rows] = self._logits[rows, self._best[rows]]

    def _choose(self) -> Ints:
        """Step 6. Rows without an answer get any token."""
        tokens = self._best.copy()
        for row, state in enumerate(self._states):
            if state.is_rare and np.isfinite(self._highest[row]):
                tokens[row] = self._draw_rare(row, state)
        is_random = np.array([not state.params.is_greedy and not state.is_rare for state in self._states])
        rows = np.flatnonzero(is_random & np.isfinite(self._highest))
        if len(rows):
            logits = self._logits if len(rows) == len(self._logits) else self._logits[rows]
            tokens[rows] = draw(logits, highest=self._highest[rows], params=self._draw_params(rows))
        return tokens

    def _draw_rare(self, row: int, state: SequenceState) -> int:
        """One row through the filters that need it sorted."""
        output_idx = self._specs[row].output_idx
        uniform, xtc_uniform = uniforms([state.seed, state.seed ^ XTC_STREAM], output_idxs=[output_idx] * 2)
        drawn = draw_rare(
            self._logits[row],
            params=state.params,
            uniform=float(uniform),
            xtc_uniform=float(xtc_uniform),
            max_surprise=state.max_surprise,
        )
        state.last_surprise = drawn.surprise  # read by `commit`; drawing again writes the same
        return drawn.token_id

    def _draw_params(self, rows: Ints) -> DrawParams:
        states = [self._states[row] for row in rows.tolist()]
        params = [state.params for state in states]
        output_idxs = [self._specs[row].output_idx for row in rows.tolist()]
        return DrawParams(
            temperatures=np.array([one.temperature for one in params], np.float64),
            top_k=np.array([one.top_k for one in params], np.int64),
            top_p=np.array([one.top_p for one in params], np.float64),
            min_p=np.array([one.min_p for one in params], np.float64),
            uniforms=uniforms([state.seed for state in states], output_idxs=output_idxs),
        )

    def _outcome(self, row: int, *, token_id: int) -> Outcome:
        """Steps 1 and 7: a failure, or the token with what was asked about it."""
        status = self._status(row)
        logprobs = self._logprobs(row, token_id=token_id) if status is DrawStatus.DRAWN else None
        return _outcome(self._specs[row].seq_id, status=status, token_id=token_id, logprobs=logprobs)

    def _status(self, row: int) -> DrawStatus:
        if not self._is_sound[row]:
            return DrawStatus.NOT_FINITE
        return DrawStatus.DRAWN if np.isfinite(self._highest[row]) else DrawStatus.NONE_ALLOWED

    def _logprobs(self, row: int, *, token_id: int) -> TokenLogprobs | None:
        num_top = self._states[row].params.logprobs
        if num_top is None:
            return None
        return token_logprobs(self._raw[row], token_id=token_id, num_top=num_top)


def outcomes_of(draws: Draws, *, specs: Sequence[SampleSpec]) -> list[Outcome]:
    """For each spec its token or its failure."""
    told = zip(specs, draws.statuses, draws.token_ids, draws.logprobs, strict=True)
    return [
        _outcome(spec.seq_id, status=status, token_id=token_id, logprobs=logprobs)
        for spec, status, token_id, logprobs in told
    ]


def _outcome(seq_id: SequenceId, *, status: int, token_id: int, logprobs: TokenLogprobs | None) -> Outcome:
    if status == DrawStatus.DRAWN:
        return SampledToken(seq_id, token_id, logprobs)
    if status == DrawStatus.NOT_FINITE:
        return SequenceFailure(seq_id, "numerical_error", "the model's logits are not finite numbers")
    return SequenceFailure(seq_id, "no_token_allowed", "masks, bans and min_tokens together allow no token")


def alter_row(row: Floats, *, state: SequenceState, output_idx: int) -> None:
    """Steps 3 to 5 for one row, changed in place."""
    params = state.params
    allowed = state.allowed_mask(len(row))
    if allowed is not None:
        apply_bitmask(row, mask=allowed)
    if banned := state.banned_now(output_idx=output_idx):
        ban_tokens(row, token_ids=banned)
    if biases := state.biases():
        add_bias(row, logit_bias=biases)
    if params.repetition_penalty != 1.0:
        seen = np.concatenate([state.prompt_ids, state.output.ids])
        penalise_repetition(row, token_ids=seen, penalty=params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        penalise_presence_and_frequency(
            row,
            token_ids=state.output.ids,
            counts=state.output.counts,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
        )
