"""Running groups taken back out of a step and the running set, to be recomputed later.

It knows who goes for whose sake and what that undoes in the step; `placement` and `newcomers` say when
somebody must, `planner` when all must. What a group computed stays in the prefix tree as cache.
"""

from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.scheduler.request import GroupState, SequenceGroup
from penstock.engine.scheduler.roster import Roster
from penstock.engine.scheduler.step_draft import StepDraft


class Preemption:
    """See the module."""

    def __init__(self, *, roster: Roster, kv: KvManager) -> None:
        self._roster = roster
        self._kv = kv

    def make_room(self, draft: StepDraft, group: SequenceGroup) -> bool:
        """Preempt somebody for `group`; False if `group` itself had to go or has to wait.

        A protected group never waits for long: what protected groups may need together fits the pool. A step
        that is planned ahead preempts nobody: most are in the step under way, and who is not would always go.
        """
        victim = self._roster.running.worst(even_busy=draft.is_ahead)
        if victim is None or draft.is_ahead:
            draft.needs_result |= victim is not None
            return False
        self.preempt(draft, victim)
        return victim is not group

    def shed(self, draft: StepDraft) -> None:
        """Memory is short: preempt down to what steps may hold now, and plan none ahead."""
        draft.needs_result = True
        running = self._roster.running
        while sum(len(group.active) for group in running) > draft.num_tokens_left:
            victim = running.worst()
            if victim is None:
                return
            self.preempt(draft, victim)

    def preempt(self, draft: StepDraft, group: SequenceGroup) -> None:
        """Put `group` back, and count it: one that was preempted often enough is protected."""
        group.num_preemptions += 1
        draft.counts.num_preemptions += 1
        self._put_back(draft, group)

    def _put_back(self, draft: StepDraft, group: SequenceGroup, *, taint: bool = False) -> None:
        """Take a running group out of the step and the running set; it is recomputed later."""
        for seq in group.live:
            if draft.remove(seq):
                self._kv.drop_copies_to(seq.blocks)
        draft.num_promised_blocks = None
        self._roster.requeue(group, taint=taint)

    def put_all_back(self, draft: StepDraft) -> None:
        """Every running group that is in no step; not counted: it is nobody's fault, and protects nobody."""
        for group in list(self._roster.running):
            if group.state is GroupState.RUNNING and not group.is_busy:
                self._put_back(draft, group)

    def restart_contaminated(self, draft: StepDraft) -> None:
        """Recompute groups that share blocks which a failed sequence computed; not counted as preemption.

        One that is in flight gets no further work until that step is applied.
        """
        self._roster.must_recheck_paths = False
        for group in list(self._roster.running):
            if not any(seq.blocks.has_lost_path for seq in group.active):
                continue
            if group.is_busy:
                self._roster.must_recheck_paths = True
            else:
                self._put_back(draft, group, taint=True)
