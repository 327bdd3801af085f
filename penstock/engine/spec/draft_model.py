"""A smaller model that guesses: many sequences in one batch, one token a round.

Its keys and values lie in blocks of their own memory with the same ids as the model's blocks: block 7 of the
draft holds the same tokens as block 7 of the model's full attention. So prefix hits, forks, copies on write
and the freeing of blocks hold for the draft without a table of its own, and its memory is a few more bytes in
every block. But the draft may have read less than the model (it is not asked while drafts do not pay), so
each block bears a mark of the text whose KV the draft has written there; what is not marked is read again
before the next guess, a bounded number of tokens a step.

```
text          [0 ......... num_read) [num_read ... start]  d1 d2 d3
               the draft's KV         read in round 1      guessed in rounds 1, 2, 3
```

A guess is drawn by the sampler with the parameters and the random number that will verify it, so that draft
and model agree wherever their distributions do.

A sequence for which a pass or a draw raises gets no guess, now and later: its answer goes on without, and so
does everybody else with theirs.

**Source:** Leviathan, Kalman, Matias, "Fast inference from transformers via speculative decoding", 2023.
"""

import logging
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final, Protocol

from msgspec.structs import replace

from penstock.core.ids import SequenceId
from penstock.engine.bisection import isolate
from penstock.engine.sampling.sampler import Outcome, Sampler
from penstock.engine.sampling.vocabulary import Floats
from penstock.engine.scheduler.plan import (
    UNKNOWN_DRAFT,
    BlockCopy,
    NewSequence,
    Proposal,
    SampledToken,
    SampleSpec,
    ScheduledSequence,
)
from penstock.engine.spec.draft_text import DraftText
from penstock.engine.spec.proposer import Guesses

MAX_READ_PER_STEP: Final = 256
"""Old tokens that the draft reads in a step for all sequences together; who is not done gets no guess yet."""
USUAL_READ: Final = 2
"""Tokens that a sequence brings when all its drafts stood: the last draft and the token after it."""
UNMARKED: Final = 0
BYTES_PER_TOKEN: Final = 8
BYTES_PER_SEQUENCE: Final = 600

log = logging.getLogger("penstock.engine.spec")


class DraftPasses(Protocol):
    """The model itself with its KV memory."""

    @property
    def buffer_bytes(self) -> int:
        """Bytes kept beside weights and KV."""
        ...

    def run(self, sequences: Sequence[ScheduledSequence]) -> Floats:
        """Compute runs of tokens.

        Returns:
            [len(sequences), vocab] float32: the logits behind each one's last token.
        """
        ...

    def move_blocks(self, *, copies: Sequence[BlockCopy], zeroed: Sequence[int]) -> None:
        """Copy and clear blocks."""
        ...

    def release(self) -> None:
        """Give memory back until `restore`; all KV is lost."""
        ...

    def restore(self) -> None:
        """Take it again."""
        ...


@dataclass(slots=True, kw_only=True)
class _Guessing:
    """One sequence while its guesses are made."""

    entry: ScheduledSequence
    text: DraftText
    drafts: list[int] = field(default_factory=list)
    is_whole: bool = True
    """All known tokens are read."""

    @property
    def num_wanted(self) -> int:
        return self.entry.num_drafts if self.is_whole else 0

    def spec(self) -> SampleSpec:
        """The draw that will verify the next guess."""
        (sample,) = self.entry.samples
        return SampleSpec(sample.seq_id, sample.output_idx + len(self.drafts))

    def give_up(self) -> None:
        """Its pass or its draw has raised: what was guessed stands, what the draft holds of it does not."""
        self.is_whole = False
        self.text.has_failed = True
        self.text.num_read = 0

    def filled(self) -> ScheduledSequence:
        """The planned sequence with its guesses."""
        known = self.entry.token_ids[: len(self.entry.token_ids) - self.entry.num_drafts]
        return replace(self.entry, token_ids=[*known, *self.drafts], num_drafts=len(self.drafts))


_Run = tuple[_Guessing, ScheduledSequence]
"""A sequence, and the tokens of it that one pass computes."""


def _give_up(each: _Guessing, error: Exception) -> None:
    kind = type(error).__name__
    log.warning("a sequence goes on without guesses, the draft model fails for it: %s", kind)
    each.give_up()


class DraftModel:
    """A `RunnerProposer` over a model."""

    def __init__(self, passes: DraftPasses, *, sampler: Sampler, num_blocks: int, block_size: int) -> None:
        """Know no sequence.

        Args:
            passes: the model and its KV memory.
            sampler: the one that verifies; it knows every sequence that is asked for.
            num_blocks: blocks of the model's pool, its scratch block not counted.
            block_size: token slots in a block.
        """
        self._passes = passes
        self._sampler = sampler
        self._block_size = block_size
        self._texts: dict[SequenceId, DraftText] = {}
        self._marks = array("q", [UNMARKED]) * (num_blocks + 1)

    @property
    def buffer_bytes(self) -> int:
        """Bytes kept beside weights and KV."""
        texts = sum(BYTES_PER_SEQUENCE + BYTES_PER_TOKEN * len(text.outputs) for text in self._texts.values())
        return self._passes.buffer_bytes + self._marks.itemsize * len(self._marks) + texts

    def add(self, new_sequences: Iterable[NewSequence]) -> None:
        """Meet sequences."""
        for new in new_sequences:
            self._texts[new.seq_id] = DraftText(prompt=new.prompt_token_ids)

    def forget(self, seq_ids: Iterable[SequenceId]) -> None:
        """Drop sequences; ids that were never met are ignored."""
        for seq_id in seq_ids:
            self._texts.pop(seq_id, None)

    def move_blocks(self, *, copies: Sequence[BlockCopy], zeroed: Sequence[int]) -> None:
        """What the step does to blocks before it computes."""
        self._passes.move_blocks(copies=copies, zeroed=zeroed)
        for block_id in (*zeroed, *(copy.dst for copy in copies)):
            self._marks[block_id] = UNMARKED

    def release(self) -> None:
        """See `RunnerProposer`."""
        self._passes.release()
        self._marks = array("q", [UNMARKED]) * len(self._marks)

    def restore(self) -> None:
        """See `RunnerProposer`."""
        self._passes.restore()

    def warm_up(self, sequences: Sequence[ScheduledSequence]) -> None:
        """Run a pass like this one."""
        self._passes.run([replace(seq, block_tables=seq.block_tables[:1]) for seq in sequences])

    def fill(self, sequences: Sequence[ScheduledSequence]) -> Guesses:
        """Guess for every sequence whose drafts are unknown; notes the tokens of all."""
        guessing: dict[SequenceId, _Guessing] = {}
        for entry in sequences:
            text = self._texts.get(entry.seq_id)
            if text is None:
                continue
            self._note(entry, text)
            if entry.num_drafts and entry.token_ids[-1] == UNKNOWN_DRAFT:
                guessing[entry.seq_id] = _Guessing(entry=entry, text=text)
        if not guessing:
            return Guesses(sequences=sequences, proposals=[], num_caught_up_tokens=0)
        num_caught_up = self._guess(list(guessing.values()))
        return Guesses(
            sequences=[
                seq if (mine := guessing.get(seq.seq_id)) is None else mine.filled() for seq in sequences
            ],
            proposals=[Proposal(each.entry.seq_id, tuple(each.drafts)) for each in guessing.values()],
            num_caught_up_tokens=num_caught_up,
        )

    def _note(self, entry: ScheduledSequence, text: DraftText) -> None:
        """Take in a planned run: its tokens are certain, and what was guessed behind `start` is void."""
        if len(entry.token_ids) == 1 and len(text) == entry.start and text.num_read <= entry.start:
            text.outputs.append(entry.token_ids[0])  # most steps, while there are no drafts
            return
        num_known = len(entry.token_ids) - entry.num_drafts
        if num_known > 1:  # a prompt, or the second time after a preemption: blocks may be other ones
            text.num_read = 0
            text.blocks.clear()
        drafts = entry.token_ids[num_known:]
        known_drafts = [] if UNKNOWN_DRAFT in drafts else drafts
        text.note([*entry.token_ids[:num_known], *known_drafts], start=entry.start)
        text.num_read = min(text.num_read, entry.start)
        del text.marks[entry.start // self._block_size :]

    def _guess(self, guessing: Sequence[_Guessing]) -> int:
        """Read what is new and guess round by round; returns how many tokens were caught up."""
        runs, num_caught_up = self._runs_to_read(guessing)
        pending = [each for each in guessing if each.is_whole]
        self._run_and_draw(runs)
        while pending := [each for each in pending if self._goes_on(each)]:
            self._run_and_draw([(each, self._next_run(each)) for each in pending])
        for each in guessing:
            self._mark(each)
        return num_caught_up

    def _runs_to_read(self, guessing: Sequence[_Guessing]) -> tuple[list[_Run], int]:
        num_left, num_caught_up = MAX_READ_PER_STEP, 0
        runs = []
        for each in guessing:
            if each.text.has_failed:
                each.is_whole = False
                continue
            self._find_read(each)
            first, end = each.text.num_read, each.entry.start + 1
            last = min(end, first + max(num_left, USUAL_READ if end - first <= USUAL_READ else 0))
            each.is_whole = last == end
            if last == first:
                continue
            num_left = max(0, num_left - (last - first))
            num_caught_up += max(0, last - first - USUAL_READ)
            runs.append((each, self._run(each, each.text.slice(first, last), start=first)))
            each.text.num_read = last
        return runs, num_caught_up

    def _find_read(self, each: _Guessing) -> None:
        """Set `num_read` to what the draft has of this text in the sequence's blocks of today."""
        table, text, size = each.entry.block_tables[0], each.text, self._block_size
        num_blocks = -(-text.num_read // size)
        if text.blocks[:num_blocks] != table[:num_blocks]:
            same = next(i for i in range(num_blocks) if i >= len(text.blocks) or text.blocks[i] != table[i])
            text.num_read = same * size
        # Blocks that others have read: a prefix hit, or a swap to the block of an equal text.
        while text.num_read % size == 0 and text.num_read + size <= each.entry.start:
            block_idx = text.num_read // size
            if self._marks[table[block_idx]] != text.mark(block_idx, block_size=size):
                break
            text.num_read += size

    def _run(self, each: _Guessing, token_ids: list[int], *, start: int) -> ScheduledSequence:
        table = each.entry.block_tables[0]
        for block_idx in range(
            start // self._block_size, (start + len(token_ids) - 1) // self._block_size + 1
        ):
            self._marks[table[block_idx]] = UNMARKED
        return ScheduledSequence(each.entry.seq_id, token_ids, start, (table,), each.entry.samples)

    def _goes_on(self, each: _Guessing) -> bool:
        return 0 < len(each.drafts) < each.num_wanted

    def _next_run(self, each: _Guessing) -> ScheduledSequence:
        start = each.entry.start + len(each.drafts)
        each.text.num_read = start + 1
        return self._run(each, each.drafts[-1:], start=start)

    def _run_and_draw(self, runs: Sequence[_Run]) -> None:
        """One pass, and one more guess for each that is read whole; who makes either raise is left out."""
        if not runs:
            return
        done = isolate(runs, attempt=self._run_part)
        for culprit in done.culprits:
            _give_up(culprit.member[0], culprit.error)
        for part, logits in done.parts:
            drawing = [(row, each) for row, (each, _) in enumerate(part) if each.is_whole]
            if drawing:
                self._draw(drawing, logits)

    def _run_part(self, runs: Sequence[_Run]) -> tuple[Sequence[_Run], Floats]:
        return runs, self._passes.run([run for _, run in runs])

    def _draw(self, guessing: Sequence[tuple[int, _Guessing]], logits: Floats) -> None:
        """One more guess for each, from its row; who gets none is done."""

        def attempt(part: Sequence[tuple[int, _Guessing]]) -> Iterable[tuple[_Guessing, Outcome]]:
            rows = [row for row, _ in part]
            specs = [each.spec() for _, each in part]
            drawn = self._sampler.sample(logits, specs=specs, rows=rows)
            return zip((each for _, each in part), drawn, strict=True)

        done = isolate(guessing, attempt=attempt)
        for culprit in done.culprits:
            _give_up(culprit.member[1], culprit.error)
        for each, outcome in chain.from_iterable(done.parts):
            if isinstance(outcome, SampledToken):
                each.drafts.append(outcome.token_id)
            else:
                each.is_whole = False

    def _mark(self, each: _Guessing) -> None:
        """Note where the KV is, and of which text the full blocks are; of known tokens, not of guesses."""
        text, table, size = each.text, each.entry.block_tables[0], self._block_size
        text.blocks = list(table[: -(-text.num_read // size)])
        for block_idx in range(min(text.num_read, each.entry.start + 1) // size - 1, -1, -1):
            mark = text.mark(block_idx, block_size=size)
            if self._marks[table[block_idx]] == mark:
                break
            self._marks[table[block_idx]] = mark
        text.note(each.drafts, start=each.entry.start + 1)
