"""A runner without a model: it keeps a pretended KV cache and draws tokens that depend on all of it.

Each slot holds the token written there and a digest of the token and of the slot before it. The next token
is a function of the sequence's seed, of how many tokens it has and of the last digest; so a block that was
shared wrongly, freed too early, not copied or not zeroed changes an answer or breaks the chain of digests,
which is checked over everything that attention would read. Faults are injected by chance from the seed.
"""

import random
from collections import deque
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from penstock.core.ids import SequenceId
from penstock.core.text import TokenLogprob, TokenLogprobs
from penstock.engine.kv.host_tier import HostMove
from penstock.engine.kv.prefix_tree import NO_BLOCK, first_window_block
from penstock.engine.scheduler.plan import (
    OUT_OF_MEMORY,
    PENDING_TOKEN,
    UNKNOWN_DRAFT,
    HostTraffic,
    Pooled,
    Proposal,
    SampledToken,
    SampleSpec,
    ScheduledSequence,
    SequenceFailure,
    StepPlan,
    StepResult,
)

MASK: Final = (1 << 61) - 1
MULTIPLIER: Final = 1_000_003
EMPTY: Final = 0
NAN: Final = -1
"""Digest of a slot that holds NaN."""
MOVE_RATE: Final = 0.7
"""Chance that the next copy between the pool and host memory ends in a step."""
START: Final = 1
"""Digest before the first token."""


class SimulationError(AssertionError):
    """An invariant does not hold; the message says which."""


def require(ok: bool, message: str) -> None:
    """Raise `SimulationError` unless `ok`."""
    if not ok:
        raise SimulationError(message)


def next_digest(digest: int, token_id: int) -> int:
    """Digest of a token that follows the text with `digest`."""
    return (digest * MULTIPLIER + token_id + 7) & MASK


def pooled_values(digests: Iterable[int]) -> tuple[float]:
    """The vector of a prompt: a number that a float holds, of all digests that count."""
    return (float(sum(digests) % (1 << 53)),)


def likeliest(digest: int, *, num_top: int, vocab_size: int) -> tuple[TokenLogprob, ...]:
    """The likeliest tokens after a text, best first, as a pure function."""
    scored = sorted(
        (-1.0 - draw_token(digest, seed=token_id, output_idx=0, vocab_size=997) / 997, token_id)
        for token_id in range(vocab_size)
    )
    best = scored[::-1][:num_top]
    return tuple(TokenLogprob(token_id, logprob, rank) for rank, (logprob, token_id) in enumerate(best, 1))


def draw_token(digest: int, *, seed: int, output_idx: int, vocab_size: int) -> int:
    """The token that follows, as a pure function; well mixed in its low bits."""
    mixed = (digest ^ (seed & MASK)) + output_idx * 0x9E3779B97F4A7C15
    mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & MASK
    return (mixed ^ (mixed >> 31)) % vocab_size


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Seconds of a step: base + per token + per sequence + per KV token read + per draft."""

    base_s: float = 0.002
    token_s: float = 0.0002
    seq_s: float = 0.0001
    kv_token_s: float = 0.000001
    draft_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRates:
    """Chances per scheduled sequence and step, 0 to 1."""

    numerical_error: float = 0.0
    step_error: float = 0.0
    out_of_memory: float = 0.0
    """Not of a single token: as on a machine where a small step always fits."""


def _owners(entry: ScheduledSequence) -> list[SequenceId]:
    """Who is answered if it fails."""
    return [spec.seq_id for spec in entry.samples] or [entry.seq_id]


def has_blanks(entry: ScheduledSequence) -> bool:
    """True if the runner is to guess its drafts."""
    return entry.num_drafts > 0 and entry.token_ids[-1] == UNKNOWN_DRAFT


def fill_in(entry: ScheduledSequence, drafts: Sequence[int] | None) -> ScheduledSequence:
    """The entry with `drafts` in place of its own; None leaves it."""
    if drafts is None:
        return entry
    known = entry.token_ids[: len(entry.token_ids) - entry.num_drafts]
    return replace(entry, token_ids=[*known, *drafts], num_drafts=len(drafts))


class FakeRunner:
    """See the module; has the launch and collect of a runner."""

    def __init__(
        self,
        *,
        windows: tuple[int | None, ...],
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        times: StepTimes,
        faults: FaultRates,
        rng: random.Random,
    ) -> None:
        self._windows = windows
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._times = times
        self._faults = faults
        self._rng = rng
        self.tokens = [0] * (num_blocks * block_size)
        self.digests = [EMPTY] * (num_blocks * block_size)
        self.seeds: dict[SequenceId, int] = {}
        """Seed of every sequence that the runner knows."""
        self._num_top: dict[SequenceId, int] = {}
        self._sums: dict[SequenceId, tuple[int, int]] = {}
        """Of prompts under way whose every token counts: where they are, and the sum up to there."""
        self._last_drawn: dict[SequenceId, int] = {}
        self._slots: dict[int, tuple[list[int], list[int]]] = {}
        """Host memory."""
        self._moves: deque[HostMove] = deque()
        self._move_rng = random.Random(num_blocks)  # noqa: S311 - a simulation, not a secret
        self.num_loads = 0
        self._lost: dict[SequenceId, int] = {}
        """Sequences that a step had no memory for, by that step, until it is collected."""
        self._memory_rng = random.Random(block_size)  # noqa: S311 - as above
        self.num_out_of_memory = 0
        self.failed: set[SequenceId] = set()
        """Sequences that were made to fail."""

    def launch(self, plan: StepPlan) -> StepResult:
        """Do the step; the handle is the result itself."""
        self._prepare(plan)
        tokens: list[SampledToken] = []
        pooled: list[Pooled] = []
        failures: list[SequenceFailure] = []
        proposals = [
            Proposal(entry.seq_id, self._guess(entry)) for entry in plan.sequences if has_blanks(entry)
        ]
        filled = {each.seq_id: each.token_ids for each in proposals}
        known = [self._put_in_place(entry) for entry in plan.sequences]
        num_failed_before = self.num_out_of_memory
        for entry in [fill_in(entry, filled.get(entry.seq_id)) for entry in known]:
            if self._lacks_memory(entry, step_id=plan.step_id):
                failures += [SequenceFailure(each, OUT_OF_MEMORY, "injected") for each in _owners(entry)]
                continue
            if entry.seq_id in self._lost:
                tokens.extend(SampledToken(spec.seq_id, 0) for spec in entry.samples)  # nobody may believe it
                continue
            failure = self._inject(entry)
            self._compute(entry, is_bad=failure is not None and failure.code == "numerical_error")
            if failure is None:
                tokens.extend(self._sample(entry))
                pooled.extend(self._pool(entry))
            else:
                failures.append(failure)
        self._last_drawn = {drawn.seq_id: drawn.token_id for drawn in tokens}
        return StepResult(
            step_id=plan.step_id,
            tokens=tokens,
            failures=failures,
            pooled=pooled,
            proposals=proposals,
            host_traffic=self._move(plan.host_moves),
            num_out_of_memory=self.num_out_of_memory - num_failed_before,
            step_time_s=self._step_time_s(plan),
        )

    def _put_in_place(self, entry: ScheduledSequence) -> ScheduledSequence:
        """The entry with the token that the step before drew, if the plan could not know it."""
        if entry.token_ids[0] != PENDING_TOKEN:
            return entry
        require(len(entry.token_ids) == 1, "a token that is being drawn is computed alone")
        is_failed = entry.seq_id in self.failed or entry.seq_id in self._lost
        require(is_failed or entry.seq_id in self._last_drawn, f"sequence {entry.seq_id} awaits no token")
        return replace(entry, token_ids=[self._last_drawn.get(entry.seq_id, 0)])

    def _lacks_memory(self, entry: ScheduledSequence, *, step_id: int) -> bool:
        """True by chance; what was planned behind a step that was not made is of no use."""
        if entry.seq_id in self._lost:
            return False
        is_short = len(entry.token_ids) > 1 and self._memory_rng.random() < self._faults.out_of_memory
        if is_short and entry.seq_id not in self.failed:
            self.num_out_of_memory += 1
            self._lost[entry.seq_id] = step_id
            return True
        return False

    def _guess(self, entry: ScheduledSequence) -> tuple[int, ...]:
        """At most as many tokens as there are blanks, by chance."""
        num_tokens = self._rng.randint(0, entry.num_drafts)
        return tuple(self._rng.randrange(self._vocab_size) for _ in range(num_tokens))

    def draw(self, handle: StepResult, *, void: Container[SequenceId]) -> StepResult:
        """The step without the draws that are void; before the next launch."""
        for seq_id in [each for each in self._last_drawn if each in void]:
            del self._last_drawn[seq_id]
        return replace(handle, tokens=[drawn for drawn in handle.tokens if drawn.seq_id not in void])

    def collect(self, handle: StepResult) -> StepResult:
        """The outcome of a launched step; what is planned from here on knows it."""
        for seq_id in [each for each, step_id in self._lost.items() if step_id == handle.step_id]:
            del self._lost[seq_id]
        return handle

    def _prepare(self, plan: StepPlan) -> None:
        for seq_id in plan.finished_seq_ids:
            require(seq_id in self.seeds, f"sequence {seq_id} finished but was never announced")
            del self.seeds[seq_id], self._num_top[seq_id]
            self._sums.pop(seq_id, None)
            self._lost.pop(seq_id, None)
        for new in plan.new_sequences:
            require(new.seq_id not in self.seeds, f"sequence {new.seq_id} announced twice")
            self.seeds[new.seq_id] = new.seed
            self._num_top[new.seq_id] = new.params.logprobs or 0
        for block in plan.blocks_to_zero:
            self._write_block(block, [0] * self._block_size, [EMPTY] * self._block_size)
        sources = [(copy.dst, *self.read_block(copy.src)) for copy in plan.block_copies]
        require(len({dst for dst, *_ in sources}) == len(sources), "two copies into one block")
        for dst, tokens, digests in sources:
            self._write_block(dst, tokens, digests)

    def _move(self, moves: Sequence[HostMove]) -> HostTraffic:
        """Carry orders out in their order, the last of them in a later step by chance.

        The bytes move at the end, so that a block that is freed or written meanwhile shows.
        """
        self._moves.extend(moves)
        ended = []
        while self._moves and self._move_rng.random() < MOVE_RATE:
            move = self._moves.popleft()
            for block, slot in zip(move.block_ids, move.slots, strict=True):
                if move.is_load:
                    self.write_block(block, self._slots[slot])
                else:
                    self._slots[slot] = self.read_block(block)
            self.num_loads += move.is_load
            ended.append(move.transfer_id)
        return HostTraffic(ended=tuple(ended))

    def read_block(self, block: int) -> tuple[list[int], list[int]]:
        """Tokens and digests of a block."""
        region = slice(block * self._block_size, (block + 1) * self._block_size)
        return self.tokens[region], self.digests[region]

    def write_block(self, block: int, content: tuple[list[int], list[int]]) -> None:
        """Overwrite a block, as a load does."""
        self._write_block(block, *content)

    def _write_block(self, block: int, tokens: list[int], digests: list[int]) -> None:
        region = slice(block * self._block_size, (block + 1) * self._block_size)
        self.tokens[region], self.digests[region] = tokens, digests

    def _inject(self, entry: ScheduledSequence) -> SequenceFailure | None:
        if entry.seq_id in self.failed:
            # It was planned before its failure was known, and reads its own NaN.
            return SequenceFailure(entry.seq_id, "numerical_error", "failed before")
        chance = self._rng.random()
        if chance >= self._faults.numerical_error + self._faults.step_error:
            return None
        is_numerical = chance < self._faults.numerical_error
        self.failed.add(entry.seq_id)
        code = "numerical_error" if is_numerical else "step_error"
        return SequenceFailure(entry.seq_id, code, f"injected {code}")

    def _compute(self, entry: ScheduledSequence, *, is_bad: bool) -> None:
        lengths = {len(table) for table in entry.block_tables}
        end = entry.start + len(entry.token_ids)
        require(len(lengths) == 1, f"sequence {entry.seq_id} has tables of different lengths")
        require(
            end <= lengths.pop() * self._block_size, f"sequence {entry.seq_id} has no slots for {end} tokens"
        )
        for table, window in zip(entry.block_tables, self._windows, strict=True):
            digest = self._digest_before(entry, table)
            for position, token_id in enumerate(entry.token_ids, start=entry.start):
                slot = self._slot(table, position)
                digest = next_digest(digest, token_id)
                self.tokens[slot], self.digests[slot] = token_id, NAN if is_bad else digest
            if not is_bad:
                self._check_chain(entry, table, window=window)

    def _digest_before(self, entry: ScheduledSequence, table: list[int]) -> int:
        return START if entry.start == 0 else self.digests[self._slot(table, entry.start - 1)]

    def _slot(self, table: list[int], position: int) -> int:
        block_idx, offset = divmod(position, self._block_size)
        require(table[block_idx] != NO_BLOCK, f"position {position} lies in a freed block")
        return table[block_idx] * self._block_size + offset

    def _check_chain(self, entry: ScheduledSequence, table: list[int], *, window: int | None) -> None:
        """All that attention reads must follow from what is before it, and no slot may hold NaN."""
        first = 0 if window is None else max(0, entry.start - window + 1)
        end = entry.start + len(entry.token_ids)
        first_block = first // self._block_size
        require(
            window is None
            or first_block == first_window_block(entry.start, window=window, block_size=self._block_size),
            "window arithmetic",
        )
        digest = START if first == 0 else self.digests[self._slot(table, first)]
        for position in range(first if first == 0 else first + 1, end):
            slot = self._slot(table, position)
            digest = next_digest(digest, self.tokens[slot])
            require(
                digest == self.digests[slot],
                f"sequence {entry.seq_id} reads foreign KV at position {position}",
            )
        for block in table[first_block:]:
            require(
                NAN not in self.read_block(block)[1], f"sequence {entry.seq_id} reads NaN of block {block}"
            )

    def _sample(self, entry: ScheduledSequence) -> list[SampledToken]:
        end = entry.start + len(entry.token_ids) - entry.num_drafts
        sampled = [self._draw(entry, spec, position=end - 1) for spec in entry.samples]
        drafts = entry.token_ids[len(entry.token_ids) - entry.num_drafts :]
        require(not drafts or len(sampled) == 1, "drafts of several answers in one run")
        for position, draft in enumerate(drafts, start=end):
            if sampled[-1].token_id != draft:
                break
            spec = SampleSpec(sampled[0].seq_id, entry.samples[0].output_idx + len(sampled))
            sampled.append(self._draw(entry, spec, position=position))
        return sampled

    def _pool(self, entry: ScheduledSequence) -> list[Pooled]:
        if entry.pooling is None:
            return []
        end = entry.start + len(entry.token_ids)
        digests = [self.digests[self._slot(entry.block_tables[0], i)] for i in range(entry.start, end)]
        if entry.pooling.kind != "mean":
            return [Pooled(entry.seq_id, pooled_values(digests[-1:]))]
        known_end, known = self._sums.get(entry.seq_id, (0, 0)) if entry.start else (0, 0)
        require(known_end == entry.start, f"sequence {entry.seq_id} has no sum up to {entry.start}")
        self._sums[entry.seq_id] = (end, known + sum(digests))
        return [Pooled(entry.seq_id, pooled_values([known, *digests]))]

    def _draw(self, entry: ScheduledSequence, spec: SampleSpec, *, position: int) -> SampledToken:
        digest = self.digests[self._slot(entry.block_tables[0], position)]
        token_id = draw_token(
            digest, seed=self.seeds[spec.seq_id], output_idx=spec.output_idx, vocab_size=self._vocab_size
        )
        top = likeliest(digest, num_top=self._num_top[spec.seq_id], vocab_size=self._vocab_size)
        return SampledToken(spec.seq_id, token_id, TokenLogprobs(TokenLogprob(token_id, 0.0, 1), top))

    def _step_time_s(self, plan: StepPlan) -> float:
        if not plan.sequences:
            return 0.0
        times = self._times
        num_kv_tokens = sum(entry.start + len(entry.token_ids) for entry in plan.sequences)
        num_drafts = sum(entry.num_drafts for entry in plan.sequences)
        return (
            times.base_s
            + times.draft_s * num_drafts
            + times.token_s * (plan.num_tokens - num_drafts)
            + times.seq_s * len(plan.sequences)
            + times.kv_token_s * num_kv_tokens
        )
