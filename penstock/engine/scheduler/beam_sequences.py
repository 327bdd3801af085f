"""Beams as sequences: after each token some are forked, others given up.

Called by `scheduler.apply`; the choice is `beams`'.
"""

from collections.abc import Sequence as Items

from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.scheduler.beams import Beam
from penstock.engine.scheduler.request import Sequence, SequenceGroup


def regroup(group: SequenceGroup, beams: Items[Beam], *, kv: KvManager) -> list[Sequence]:
    """Let the group's sequences continue `beams`, each one token longer than its parent.

    A parent's first child goes on in its sequence and blocks; further children take sequences that nothing
    continues, and share the parent's blocks until they write. Nothing of the group may be in flight.

    Returns:
        Sequences that are left over; the caller ends them.
    """
    parents = [group.live[beam.parent] for beam in beams]
    heirs: dict[int, Sequence] = {}
    taken: set[int] = set()
    for place, parent in enumerate(parents):
        if parent.seq_id not in taken:
            taken.add(parent.seq_id)
            heirs[place] = parent
    spare = [seq for seq in group.live if seq.seq_id not in taken]
    for place, parent in enumerate(parents):
        if place not in heirs:
            heirs[place] = _continue_in(spare.pop(0), parent, kv=kv)
    group.live = [heirs[place] for place in range(len(beams))]
    for seq, beam in zip(group.live, beams, strict=True):
        seq.token_ids.append(beam.token_ids[-1])
    return spare


def _continue_in(seq: Sequence, parent: Sequence, *, kv: KvManager) -> Sequence:
    """Make `seq` a second sequence with the tokens and blocks of `parent`."""
    assert not seq.num_inflight_tokens, "beams advance in lockstep"
    blocks = kv.fork(parent.blocks)
    kv.free(seq.blocks)
    seq.blocks = blocks
    seq.token_ids = list(parent.token_ids)
    seq.num_computed_tokens = parent.num_computed_tokens
    return seq
