"""Draws on the host, from logits that are there: the counterpart of `device_draws`.

An exception in the sampler is traced to its draws by repeating the work on halves of them: sampling changes
nothing until `commit`.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import chain

from penstock.core.ids import SequenceId
from penstock.engine.bisection import isolate
from penstock.engine.runner.decode_steps import DecodeSteps
from penstock.engine.runner.failures import numerical_errors, step_error
from penstock.engine.runner.forward_pass import ForwardPass
from penstock.engine.sampling.masks import MaskSource
from penstock.engine.sampling.sampler import Outcome, Sampler
from penstock.engine.sampling.vocabulary import Floats
from penstock.engine.scheduler.plan import SampledToken, SampleSpec, ScheduledSequence
from penstock.engine.spec.verify import DraftRun, Draw, verify
from penstock.kernels.transfer import on_host


class HostDraws:
    """See the module; keeps nothing between steps."""

    def __init__(
        self,
        sampler: Sampler,
        *,
        decodes: DecodeSteps | None = None,
        before_sample: Callable[[Sequence[SequenceId]], None] | None = None,
        on_error: Callable[[Exception], None],
    ) -> None:
        """Take who draws.

        Args:
            sampler: knows the sequences.
            decodes: may have drawn with a pass; told whether to do so in the next.
            before_sample: where tests make draws fail.
            on_error: told of draws that raised, before they are tried in halves.
        """
        self._sampler = sampler
        self._decodes = decodes
        self._before_sample = before_sample
        self._on_error = on_error

    def draw(
        self, done: ForwardPass, *, masks: MaskSource | None, void: Collection[SequenceId]
    ) -> list[Outcome]:
        """Every sequence of one pass: tokens, which are committed, or failures.

        Args:
            done: the pass.
            masks: what the sequences may draw; None allows all of them everything.
            void: sequences for which nothing is drawn.
        """
        if self._decodes:
            self._decodes.draws_ahead = masks is None
        if done.drawn is not None and masks is None and not void and all(done.soundness()):
            return self._take_drawn(done.drawn)
        outcomes: list[Outcome] = []
        runs: list[DraftRun] = []
        row = 0
        for seq, is_sound in zip(done.sequences, done.soundness(), strict=True):
            if is_sound:
                runs += self._runs_of(seq, row=row)
            else:
                outcomes += numerical_errors(seq)
            row += 1 + seq.num_drafts if seq.samples else 0
        runs = [run for run in runs if run.first.spec.seq_id not in void]
        return outcomes + self._verified(runs, done=done, masks=masks)

    def _take_drawn(self, specs: Sequence[SampleSpec]) -> list[Outcome]:
        """What the pass itself drew."""
        outcomes = self._sampler.prepared_outcomes(specs)
        self._sampler.commit([each for each in outcomes if isinstance(each, SampledToken)])
        return outcomes

    def _runs_of(self, seq: ScheduledSequence, *, row: int) -> list[DraftRun]:
        """The draws of a sequence whose logits begin at `row`."""
        if not seq.num_drafts:
            return [DraftRun(Draw(spec, row)) for spec in seq.samples]
        (spec,) = seq.samples
        is_free = self._sampler.is_free_of_history(spec.seq_id)
        drafts = seq.token_ids[-seq.num_drafts :]
        return [DraftRun(first=Draw(spec, row), drafts=drafts, is_free_of_history=is_free)]

    def _verified(
        self, runs: Sequence[DraftRun], *, done: ForwardPass, masks: MaskSource | None
    ) -> list[Outcome]:
        """What is drawn, of drafts only those that it confirms."""
        if not runs:
            return []
        logits = on_host(done.logits)

        def draw(draws: Sequence[Draw]) -> list[Outcome]:
            return self._isolated(logits, draws=draws, masks=masks)

        return verify(runs, draw=draw, commit=self._sampler.commit)

    def _isolated(self, logits: Floats, *, draws: Sequence[Draw], masks: MaskSource | None) -> list[Outcome]:
        """The outcome of each draw, in order."""

        def attempt(part: Sequence[Draw]) -> list[Outcome]:
            return self._sample(logits, draws=part, masks=masks)

        taken = isolate(draws, attempt=attempt, on_error=self._on_error)
        drawn = chain.from_iterable(taken.parts)
        if not taken.culprits:
            return list(drawn)
        errors = {culprit.member: culprit.error for culprit in taken.culprits}
        return [
            step_error(each.spec.seq_id, error=errors[each], place="sampler")
            if each in errors
            else next(drawn)
            for each in draws
        ]

    def _sample(self, logits: Floats, *, draws: Sequence[Draw], masks: MaskSource | None) -> list[Outcome]:
        specs = [draw.spec for draw in draws]
        if self._before_sample:
            self._before_sample([spec.seq_id for spec in specs])
        rows = [draw.row for draw in draws]
        allowed = None if masks is None else [masks.row(draw.spec.seq_id, depth=draw.depth) for draw in draws]
        return self._sampler.sample(logits, specs=specs, rows=rows, masks=allowed)
