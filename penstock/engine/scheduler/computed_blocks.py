"""What becomes of blocks once they are computed: the tree, a connector, the answers that share a prompt.

Called for every sequence of a step, after it, and when a load has ended.
"""

from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.scheduler.request import Sequence, SequenceGroup
from penstock.engine.scheduler.transfers import KvTransfers


def settle_blocks(seq: Sequence, *, kv: KvManager, transfers: KvTransfers) -> None:
    """Enter full blocks into the tree, and fork once the prompt is computed; nothing if `seq` has ended."""
    if seq.finish_reason is not None:
        return
    group = seq.group
    num_known = seq.blocks.num_tree_blocks
    if kv.cache_full_blocks(seq.blocks, seq.token_ids, num_computed_tokens=seq.num_computed_tokens):
        transfers.save(seq, first_block=num_known)
    if group.needs_fork and seq.num_computed_tokens == group.num_prompt_tokens:
        _fork(group, kv=kv)


def _fork(group: SequenceGroup, *, kv: KvManager) -> None:
    leader = group.live[0]
    for seq in group.live[1:]:
        seq.blocks = kv.fork(leader.blocks)
        seq.num_computed_tokens = group.num_prompt_tokens
    group.is_forked = True
