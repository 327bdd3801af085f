"""Waiting one step for a prefix that another request computes now, instead of computing it twice.

A pure rule over the step under plan; it keeps its two counters on the group. Called by `scheduler`.
"""

from typing import Final

from penstock.engine.kv.prefix_tree import PrefixMatch
from penstock.engine.scheduler.request import Sequence, SequenceGroup
from penstock.engine.scheduler.step_draft import PrefixPlace, StepDraft

MAX_DEFERRALS: Final = 16
"""A request waits for a prefix under computation at most so many steps in a row without gaining from it."""


def next_place(seq: Sequence, *, block_size: int) -> PrefixPlace | None:
    """Where the block that `seq` fills next will be in the tree; None if it is not all known."""
    blocks = seq.blocks
    num_blocks = blocks.num_tree_blocks + 1
    if not blocks.can_cache or num_blocks * block_size > seq.num_tokens:
        return None
    blocks.extend_keys(seq.token_ids, num_blocks=num_blocks, block_size=block_size)
    return (blocks.node or blocks.namespace, blocks.keys[num_blocks - 1])


def is_held_back(draft: StepDraft, group: SequenceGroup, match: PrefixMatch, *, block_size: int) -> bool:
    """True if `group` should wait: one of no lower tier computes its next block in this very step.

    Args:
        draft: the step so far.
        group: the next in the queue; its count of deferrals grows with each call that finds a leader.
        match: what the tree holds of it already.
        block_size: tokens in a block.
    """
    if group.needs_whole_prompt:
        return False
    leader = group.live[0]
    blocks = leader.blocks
    if match.num_blocks >= (group.target(leader) - 1) // block_size or not blocks.can_cache:
        return False
    parent = match.path[-1] if match.path else blocks.namespace
    leader_tier = draft.tier_computing((parent, blocks.keys[match.num_blocks]))
    if leader_tier is None or leader_tier > group.tier:
        return False
    if match.num_blocks > group.num_deferred_blocks:
        group.num_deferred_blocks, group.num_deferrals = match.num_blocks, 0
    group.num_deferrals += 1
    return group.num_deferrals <= MAX_DEFERRALS
