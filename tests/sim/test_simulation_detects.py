"""The simulator finds bugs: each sabotage of the real code is caught within a few seeds."""

import pytest

from penstock.engine.kv.block_pool import BlockPool
from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.scheduler import answer, planner
from penstock.engine.scheduler.placement import Placement
from penstock.engine.scheduler.plan import SampleSpec
from penstock.engine.scheduler.planner import Planner
from penstock.engine.scheduler.policy import ArrivalQueue, FairPolicy
from penstock.engine.scheduler.request import SequenceGroup
from penstock.engine.scheduler.roster import Roster
from penstock.engine.scheduler.running_set import RunningSet
from penstock.sim import __main__ as command
from penstock.sim.clock import VirtualClock
from penstock.sim.simulator import simulate
from penstock.sim.workload import make_workload

NUM_SEEDS = 120


def is_caught(*, is_async: bool = False) -> bool:
    for seed in range(NUM_SEEDS):
        try:
            simulate(seed, is_async=is_async)
        except (AssertionError, LookupError, ValueError):
            return True
    return False


def forget_to_copy(monkeypatch):
    monkeypatch.setattr(KvManager, "_shared_partials", lambda self, blocks, *, start: [])


def forget_to_zero(monkeypatch):
    monkeypatch.setattr(BlockPool, "take_blocks_to_zero", lambda self: [])


def leak_a_block(monkeypatch):
    original = KvManager._release_all

    def leaky(self, blocks):
        if blocks.num_blocks > 3:
            blocks.tables[0].pop()
            blocks.tables[0].append(-1)
        original(self, blocks)

    monkeypatch.setattr(KvManager, "_release_all", leaky)


def find_prompts_of_means_in_the_cache(monkeypatch):
    monkeypatch.setattr(SequenceGroup, "needs_whole_prompt", property(lambda self: False))


def free_the_window_too_early(monkeypatch):
    original = KvManager.free_behind_window

    def early(self, blocks, *, num_computed_tokens):
        original(self, blocks, num_computed_tokens=num_computed_tokens + self.block_size)

    monkeypatch.setattr(KvManager, "free_behind_window", early)


def mix_up_prefixes(monkeypatch):
    monkeypatch.setattr(
        "penstock.engine.kv.block_table.block_keys",
        lambda ids, *, block_size: [bytes([sum(ids) % 2])] * (len(ids) // block_size),
    )


def release_parents_first(monkeypatch):
    def wrong(self, blocks):
        for table in blocks.tables:
            for block in table:
                if block != -1:
                    self.pool.release(block)
            table.clear()
        blocks.heads[:] = [0] * len(blocks.heads)

    monkeypatch.setattr(KvManager, "_release_all", wrong)


def end_twice(monkeypatch):
    original = Roster.fail

    def twice(self, failures):
        failures = list(failures)
        original(self, failures)
        self._deltas.extend(self._deltas[-1:] if failures else [])

    monkeypatch.setattr(Roster, "fail", twice)


def serve_the_youngest(monkeypatch):
    def pop(self):
        youngest = max((entry for entry in self._heap if entry[0] in self._members), default=None)
        if youngest is None:
            return None
        self.remove(youngest[1])
        return youngest[1]

    monkeypatch.setattr(ArrivalQueue, "pop", pop)


def serve_who_had_most(monkeypatch):
    def pop(self):
        tier = min((key[0] for key in self._queues), default=None)
        keys = [key for key in self._queues if key[0] == tier]
        if not keys:
            return None
        key = max(keys, key=lambda key: self._served[key[1]])
        group = self._queues[key].pop()
        self._renew_entry(key)
        return group

    monkeypatch.setattr(FairPolicy, "pop", pop)


def free_while_in_flight(monkeypatch):
    monkeypatch.setattr(SequenceGroup, "is_busy", property(lambda self: False))


def ignore_the_limit_of_preemptions(monkeypatch):
    monkeypatch.setattr(RunningSet, "is_protected", lambda self, group: False)


def cut_answers_short(monkeypatch):
    original = answer.judge_token

    def short(seq, token_id, *, max_model_len):
        return original(seq, token_id, max_model_len=max_model_len - 1)

    monkeypatch.setattr(answer, "judge_token", short)


def keep_bad_blocks_in_the_tree(monkeypatch):
    monkeypatch.setattr(KvManager, "_taint", lambda self, blocks: None)


def neglect_the_oldest(monkeypatch):
    """It starts in order and ends once, with the right tokens: only its own bound of steps tells."""
    plan_of_all, place_anyone, last_step_id = Planner.plan, Placement.place, 0

    def plan(self, *, is_ahead=False):
        nonlocal last_step_id
        last_step_id = self._last_step_id
        return plan_of_all(self, is_ahead=is_ahead)

    def place(self, draft, seq, *, num_tokens):
        oldest = min(group.arrival_idx for group in self._preemption._roster.groups)
        if seq.group.arrival_idx == oldest and last_step_id % 8:
            return 0
        return place_anyone(self, draft, seq, num_tokens=num_tokens)

    monkeypatch.setattr(Planner, "plan", plan)
    monkeypatch.setattr(Placement, "place", place)


@pytest.mark.parametrize(
    "sabotage",
    [
        forget_to_copy,
        forget_to_zero,
        leak_a_block,
        free_the_window_too_early,
        find_prompts_of_means_in_the_cache,
        mix_up_prefixes,
        release_parents_first,
        end_twice,
        serve_the_youngest,
        serve_who_had_most,
        free_while_in_flight,
        ignore_the_limit_of_preemptions,
        cut_answers_short,
        keep_bad_blocks_in_the_tree,
        neglect_the_oldest,
    ],
)
def test_a_sabotage_is_caught(sabotage, monkeypatch):
    sabotage(monkeypatch)
    assert is_caught()


def compute_behind_the_last_place(monkeypatch):
    monkeypatch.setattr(
        planner,
        "can_go_ahead",
        lambda seq, *, max_model_len: seq.num_pending_tokens == 1 and seq.group.beams is None,
    )


def free_an_answer_that_is_in_a_step(monkeypatch):
    def give_up(self, seq):
        self.running.num_seqs -= 1
        self._forget(seq)

    monkeypatch.setattr(Roster, "give_up", give_up)


def draw_for_the_place_of_the_token_before(monkeypatch):
    original = Placement._samples

    def samples(self, seq, *, end):
        return tuple(SampleSpec(spec.seq_id, seq.num_outputs) for spec in original(self, seq, end=end))

    monkeypatch.setattr(Placement, "_samples", samples)


def let_beams_and_drafts_go_ahead(monkeypatch):
    monkeypatch.setattr(planner, "needs_result", lambda seq, *, speculates: False)
    monkeypatch.setattr(planner, "can_go_ahead", lambda seq, *, max_model_len: seq.num_pending_tokens == 1)


@pytest.mark.parametrize(
    "sabotage",
    [
        compute_behind_the_last_place,
        free_an_answer_that_is_in_a_step,
        draw_for_the_place_of_the_token_before,
        let_beams_and_drafts_go_ahead,
    ],
)
def test_a_sabotage_of_asynchrony_is_caught(sabotage, monkeypatch):
    sabotage(monkeypatch)
    assert is_caught(is_async=True)


def test_virtual_time_moves_only_when_told():
    clock = VirtualClock()
    before = clock.wall()
    clock.advance(1.5)
    assert (clock.monotonic(), clock.wall() - before) == (1.5, 1.5)


def test_a_seed_means_the_same_workload_and_outcome():
    assert make_workload(7) == make_workload(7)
    assert simulate(7) == simulate(7)


def test_the_seeds_cover_what_they_are_for():
    settings = [make_workload(seed).setting for seed in range(200)]
    outcomes = [simulate(seed) for seed in range(60)]
    assert {setting.config.policy for setting in settings} == {"fcfs", "priority", "fair"}
    assert any(None not in setting.layout.windows for setting in settings)
    assert any(setting.overlaps for setting in settings)
    assert any(setting.has_connector for setting in settings)
    assert sum(outcome.num_preemptions for outcome in outcomes) > 10
    assert sum(outcome.num_hit_tokens for outcome in outcomes) > 100
    assert sum(outcome.num_failures for outcome in outcomes) > 5


def test_the_command_replays_a_seed_and_says_how_on_failure(monkeypatch, capsys):
    assert command.main(["--seed", "3", "--count", "2"]) == 0
    assert "seed=3" in capsys.readouterr().out
    forget_to_copy(monkeypatch)
    assert command.main(["--count", str(NUM_SEEDS)]) == 1
    assert "replay: python -m penstock.sim --seed" in capsys.readouterr().out
