"""How long a step takes: a linear model, fitted online from the steps themselves.

    step_time = a + b * tokens + c * sequences + d * kv_tokens_read + e * chunk_pairs + f * drafts;  a..f >= 0

Decodes read the KV cache (d); a prompt's chunk multiplies each of its tokens with the whole context before it
(e), which is what makes the end of a long prompt dearer than its beginning. A draft (f) costs what guessing
and verifying it takes: nearly nothing where a step waits for memory, as much as a token where it computes.

It knows no requests. `scheduler` asks it for the token budget of a step under a time target and for the
wait in the queue, `drafting` for the price of a draft. Pure Python, about 20 microseconds an update.
"""

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

FORGETTING: Final = 0.98
"""Weight of a step against the next one: the last 50 steps or so count."""
SCALES: Final = (1.0, 256.0, 16.0, 16384.0, 262144.0, 16.0)
"""Typical sizes of the six features, so that the ridge treats them alike."""
RIDGE: Final = 1e-6
SWEEPS: Final = 6
FIRST_SWEEPS: Final = 40
"""While there are few observations each moves the solution far."""
NUM_FIRST_STEPS: Final = 8
SOLVE_ORDER: Final = (1, 0, 2, 3, 4, 5)
"""The tokens first: what several features explain alike is laid on them. A first chunk that is too small is
mended by the next step, one that is too large is a gap in every running answer."""
CAUTION_MEMORY: Final = 0.85
"""Per step with a chunk: half of an overrun is forgotten after 4 of them. Overruns come in rows; to remember
longer costs the prompt more than it saves the answers."""
USUAL_OVERRUN: Final = 1.1
"""Steps scatter by so much; only what is beyond makes cautious."""
MAX_CAUTION: Final = 1.25
"""Most that a chunk's step is expected to overrun its prediction; a single hiccup says no more."""
OUTLIER_FACTOR: Final = 4.0
"""A step that takes longer than this times the prediction is taken as so much: a page fault or a busy
machine must not shrink the batch for the next hundred steps."""
MIN_STEPS_FOR_OUTLIERS: Final = 16
MAX_UNLEARNT: Final = 8
"""Steps that are learnt from at once where nobody asks in between. The arithmetic of one takes 15 us when its
code is in a cache, and 80 us when a model's weights have just been read over it."""

UNNOTICED_GAP_S: Final = 0.05
"""Nobody reads 20 tokens a second: a stream with gaps up to this is as good as one with shorter ones."""


class StepLoad(NamedTuple):
    """What a step's time depends on."""

    num_tokens: int
    """Drafts not counted."""
    num_seqs: int
    num_kv_tokens: int
    """Sum of the context lengths that attention reads."""
    num_chunk_pairs: int = 0
    """Sum over prompt chunks of their tokens times the context after them; decodes have none."""
    num_draft_tokens: int = 0
    """Guesses that are verified beside the tokens."""


class TimedStep(NamedTuple):
    """A step that has been run."""

    load: StepLoad
    step_time_s: float


class CostModel:
    """Non-negative least squares with exponential forgetting.

    Keeps the normal equations, decayed by `FORGETTING` each step, and solves them under w >= 0 by coordinate
    descent from the last solution.

    **Source:** Haykin, "Adaptive filter theory", chapter on recursive least squares (information form);
    Franc, Hlavac, Navara, "Sequential coordinate-wise algorithm for NNLS", 2005.
    """

    def __init__(self) -> None:
        size = len(SCALES)
        self._gram = [[RIDGE if i == j else 0.0 for j in range(size)] for i in range(size)]
        self._moment = [0.0] * size
        self._weights = [0.0] * size
        self._num_steps = 0
        self._num_draft_steps = 0
        self._caution = 1.0
        self._unlearnt: list[TimedStep] = []
        """Observed, in order; every answer is that of all observations."""

    @property
    def caution(self) -> float:
        """By what factor steps with chunks overran their prediction lately, 1 to `MAX_CAUTION`."""
        self._learn()
        return self._caution

    @property
    def num_draft_steps(self) -> int:
        """Observed steps that verified drafts."""
        self._learn()
        return self._num_draft_steps

    @property
    def coefficients(self) -> tuple[float, float, float, float, float, float]:
        """Seconds: a, b per token, c per sequence, d per KV token read, e per chunk pair, f per draft."""
        self._learn()
        a, b, c, d, e, f = (weight / scale for weight, scale in zip(self._weights, SCALES, strict=True))
        return a, b, c, d, e, f

    @property
    def draft_s(self) -> float:
        """Seconds that a draft adds to a step; as much as a token while too few steps had drafts to tell."""
        _, per_token_s, *_, known_s = self.coefficients
        if self._num_draft_steps >= NUM_FIRST_STEPS:
            return known_s
        return max(known_s, per_token_s)

    def predict(self, load: StepLoad) -> float:
        """Seconds that a step takes; 0 before the first observation."""
        a, b, c, d, e, f = self.coefficients
        decodes_s = a + b * load.num_tokens + c * load.num_seqs + d * load.num_kv_tokens
        return decodes_s + e * load.num_chunk_pairs + f * load.num_draft_tokens

    def observe(self, load: StepLoad, *, step_time_s: float) -> None:
        """Learn from one step; ignores times that are not positive."""
        if step_time_s <= 0.0:
            return
        self._unlearnt.append(TimedStep(load, step_time_s))
        if len(self._unlearnt) >= MAX_UNLEARNT:
            self._learn()

    def _learn(self) -> None:
        """Take in what has been observed since the last time."""
        if self._unlearnt:
            steps, self._unlearnt = self._unlearnt, []
            for load, step_time_s in steps:
                self._learn_step(load, step_time_s=step_time_s)

    def _learn_step(self, load: StepLoad, *, step_time_s: float) -> None:
        predicted_s = self.predict(load)
        if load.num_chunk_pairs and self._num_steps >= NUM_FIRST_STEPS:
            self._note_overrun(step_time_s / max(predicted_s, 1e-4))
        if self._num_steps >= MIN_STEPS_FOR_OUTLIERS:
            step_time_s = min(step_time_s, OUTLIER_FACTOR * max(predicted_s, 1e-4))
        self._num_steps += 1
        self._num_draft_steps += load.num_draft_tokens > 0
        self._update_equations((1.0, *load), step_time_s=step_time_s)
        self._solve()

    def prime(self, steps: Iterable[TimedStep]) -> None:
        """Learn from steps run before the first request."""
        for load, step_time_s in steps:
            self.observe(load, step_time_s=step_time_s)

    def _note_overrun(self, ratio: float) -> None:
        forgotten = 1.0 + CAUTION_MEMORY * (self._caution - 1.0)
        overrun = ratio if ratio > USUAL_OVERRUN else 1.0
        self._caution = min(MAX_CAUTION, max(forgotten, overrun))

    def _update_equations(self, features: tuple[float, ...], *, step_time_s: float) -> None:
        scaled = [value / scale for value, scale in zip(features, SCALES, strict=True)]
        for i, row in enumerate(self._gram):
            for j in range(len(scaled)):
                row[j] = FORGETTING * row[j] + scaled[i] * scaled[j]
            row[i] += (1.0 - FORGETTING) * RIDGE
            self._moment[i] = FORGETTING * self._moment[i] + scaled[i] * step_time_s

    def _solve(self) -> None:
        weights = self._weights
        for _ in range(SWEEPS if self._num_steps > NUM_FIRST_STEPS else FIRST_SWEEPS):
            for i in SOLVE_ORDER:
                row = self._gram[i]
                gradient = self._moment[i] - sum(map(float.__mul__, row, weights))
                weights[i] = max(0.0, weights[i] + gradient / row[i])

    def token_budget(
        self,
        *,
        target_s: float,
        num_seqs: int,
        num_kv_tokens: int,
        chunk_start: int = 0,
        num_draft_tokens: int = 0,
    ) -> float:
        """Most tokens that a step may compute to end within `target_s`; infinite if tokens cost nothing.

        Args:
            target_s: seconds.
            num_seqs: sequences in the step, the chunk's included.
            num_kv_tokens: context that is read for all of them.
            chunk_start: tokens before the chunk; each of the chunk's tokens is multiplied with those, and
                with the chunk itself.
            num_draft_tokens: drafts in the step, not counted in the result.
        """
        a, b, c, d, e, f = self.coefficients
        spare_s = target_s - a - c * num_seqs - d * num_kv_tokens - f * num_draft_tokens
        per_token_s = b + e * chunk_start
        if spare_s <= 0.0:
            return 0.0
        if per_token_s <= 0.0 and e <= 0.0:
            return float("inf")
        # The root of e n^2 + per_token n = spare, in the form that survives e = 0.
        return 2 * spare_s / (per_token_s + math.sqrt(per_token_s * per_token_s + 4 * e * spare_s))


def step_target_s(configured_s: float, *, decodes_s: float, stretch: float) -> float:
    """How long a step may take that computes prompts beside running decodes.

    At most what is configured, and at most `stretch` times what the decodes alone take, so that a
    running answer hardly slows when a prompt arrives; but a step shorter than `UNNOTICED_GAP_S` disturbs
    nobody. Where the decodes alone take more than half of all that (a large model on a slow machine), the
    step may take twice their time (`stretch` times, if that is less): prompts that only get the crumbs would
    leave the batch half empty.

    Args:
        configured_s: `step_time_target_ms`, in seconds.
        decodes_s: predicted time of a step with the decodes alone.
        stretch: `decode_stretch`, 1 or more.
    """
    gentle_s = max(UNNOTICED_GAP_S, stretch * decodes_s)
    return max(min(2.0, stretch) * decodes_s, min(configured_s, gentle_s))
