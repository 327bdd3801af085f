"""A step under plan: what is taken back out leaves no trace in it."""

from policy_rig import Rig

from penstock.core.text import Priority
from penstock.engine.scheduler.request import Sequence
from penstock.engine.scheduler.step_draft import StepDraft


def sequences(num_groups: int) -> list[Sequence]:
    rig = Rig()
    for idx in range(num_groups):
        rig.add(f"r{idx}", [1] * 8, priority=list(Priority)[idx])
    return [group.live[0] for group in rig.scheduler.groups]


def test_a_removed_sequence_leaves_no_trace():
    (seq,) = sequences(1)
    draft = StepDraft(num_tokens_left=64)
    draft.add(seq, num_tokens=8, samples=())
    draft.note_next_block(seq, (seq.blocks.namespace, b"k"))
    draft.decodes.add(seq.seq_id)
    assert draft.remove(seq)
    assert draft == StepDraft(num_tokens_left=64)
    assert not draft.remove(seq)


def test_a_block_under_computation_has_the_best_tier_of_those_that_stay():
    best, worst = sequences(2)
    place = (best.blocks.namespace, b"k")
    draft = StepDraft(num_tokens_left=64)
    for seq in (worst, best):
        draft.add(seq, num_tokens=8, samples=())
        draft.note_next_block(seq, place)
    assert best.group.tier <= worst.group.tier
    assert draft.tier_computing(place) == best.group.tier
    draft.remove(best)
    assert draft.tier_computing(place) == worst.group.tier
    draft.remove(worst)
    assert draft.tier_computing(place) is None


def test_who_is_preempted_does_not_wait_for_the_prefix_it_was_computing_itself():
    rig = Rig(max_num_seqs=2, max_num_batched_tokens=12, policy="priority")
    rig.add("pair", [1] * 20, n=2, priority=Priority.BATCH, max_tokens=2)
    rig.step()
    rig.add("urgent", [2] * 3, priority=Priority.REALTIME, max_tokens=2)
    _, output = rig.step()
    assert output.stats.num_preemptions == 1
    pair = next(group for group in rig.scheduler.groups if group.request.request_id == "pair")
    assert pair.num_deferrals == 0


def test_a_preempted_decode_takes_nothing_from_the_budget_of_the_step():
    """Both decode; the pool runs dry for the first, so the second goes and its token with it."""
    rig = Rig(num_blocks=4, caching=False, policy="priority", max_num_batched_tokens=16)
    seen = []
    limit = rig.scheduler._planner._limit_chunks
    rig.scheduler._planner._limit_chunks = lambda draft, **chunk: (
        seen.append((len(draft.decodes), set(draft.scheduled))) or limit(draft, **chunk)
    )
    rig.add("batch", [2] * 2, max_tokens=10, priority=Priority.BATCH)
    rig.step()
    rig.add("old", [1] * 4, max_tokens=10)
    rig.run()
    assert sum(delta.stats.num_preemptions for delta in rig.deltas if delta.stats) == 1
    assert all(num_decodes <= len(scheduled) for num_decodes, scheduled in seen)
