"""From an admitted `EngineRequest` to the group of sequences that the scheduler works with.

It numbers arrivals and sequences and gives each answer its seed; it keeps no group. Called by `scheduler`.
"""

from penstock.core.ids import SequenceId
from penstock.core.ports import Clock, Rng
from penstock.core.tokens import EngineRequest
from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.scheduler.beams import BeamSearch
from penstock.engine.scheduler.constraint import Constraint
from penstock.engine.scheduler.request import Sequence, SequenceGroup, derive_seed


class GroupMaker:
    """Makes the groups of one engine."""

    def __init__(self, *, kv: KvManager, clock: Clock, rng: Rng) -> None:
        self._kv = kv
        self._clock = clock
        self._rng = rng
        self._num_arrivals = 0
        self._last_seq_id = 0

    def make(
        self, request: EngineRequest, *, tier: int, num_blocks_max: int, constraint: Constraint | None = None
    ) -> SequenceGroup:
        """A waiting group with all its sequences, none of which holds a block.

        Args:
            request: checked for admission.
            tier: its priority as the policy sees it.
            num_blocks_max: most blocks it can ever hold at once.
            constraint: at its start; each answer gets its own.
        """
        group = SequenceGroup(
            request=request,
            arrival_idx=self._num_arrivals,
            arrival_s=self._clock.monotonic(),
            tier=tier,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_blocks_max=num_blocks_max,
            prompt_logprobs=None if request.params.prompt_logprobs is None else [],
        )
        if request.params.use_beam_search:
            group.beams = BeamSearch(request=request, max_tokens=request.max_tokens)
        self._num_arrivals += 1
        seed = self._rng.getrandbits(64) if request.params.seed is None else request.params.seed
        num_sequences = request.params.num_sequences
        group.sequences = [self._make_sequence(group, index, seed) for index in range(num_sequences)]
        if constraint is not None:
            for seq in group.sequences:
                seq.constraint = constraint.fork() if seq.index else constraint
        group.live = list(group.sequences)
        return group

    def _make_sequence(self, group: SequenceGroup, index: int, seed: int) -> Sequence:
        request = group.request
        self._last_seq_id += 1
        blocks = self._kv.new_sequence(
            adapter_revision=request.adapter_revision,
            tenant_id=request.tenant_id,
            cache_salt=request.cache_salt,
        )
        return Sequence(
            seq_id=SequenceId(self._last_seq_id),
            group=group,
            index=index,
            seed=derive_seed(seed, answer_idx=index),
            token_ids=request.prompt_token_ids,
            blocks=blocks,
            num_prompt_tokens=len(request.prompt_token_ids),
        )
