"""Scheduler with a KV connector: state waiting_kv, loads, saves, failures, cancellations."""

from collections.abc import Sequence

from policy_rig import Rig, shape

from penstock.core.ports import KvTransfer, KvTransferEnd
from penstock.core.text import FinishReason


class ScriptedConnector:
    """Offers a fixed number of tokens; ends transfers when told to."""

    def __init__(self, num_loadable: int = 0) -> None:
        self.num_loadable = num_loadable
        self.loads: list[KvTransfer] = []
        self.saves: list[KvTransfer] = []
        self.ended: list[KvTransferEnd] = []

    def num_loadable_tokens(
        self, namespace: Sequence[str], token_ids: Sequence[int], *, num_computed_tokens: int
    ) -> int:
        return max(0, self.num_loadable - num_computed_tokens)

    def begin_load(self, transfer: KvTransfer) -> None:
        self.loads.append(transfer)

    def begin_save(self, transfer: KvTransfer) -> None:
        self.saves.append(transfer)

    def poll(self) -> list[KvTransferEnd]:
        ended, self.ended = self.ended, []
        return ended


def test_a_request_waits_for_its_load_and_computes_the_rest():
    connector = ScriptedConnector(num_loadable=8)
    rig = Rig(connector=connector)
    rig.add("a", [1] * 10, max_tokens=2)
    assert not rig.scheduler.schedule().has_work
    assert rig.scheduler.reports()[0].state == "waiting_kv"
    load = connector.loads[0]
    assert (load.token_ids, load.first_block, load.block_ids) == ([1] * 8, 0, ([0, 1],))
    connector.ended = [KvTransferEnd(load.transfer_id)]
    plan, _ = rig.step()
    assert shape(plan) == [(1, 8, 2)]
    assert plan.sequences[0].block_tables == ([0, 1, 2],)
    assert rig.of("a")[0].num_cached_tokens == 8


def test_others_run_while_one_waits_for_its_load():
    connector = ScriptedConnector(num_loadable=8)
    rig = Rig(connector=connector)
    rig.add("loading", [1] * 10, max_tokens=2)
    rig.scheduler.schedule()
    connector.num_loadable = 0
    rig.add("other", [2] * 5, max_tokens=2)
    assert shape(rig.step()[0]) == [(2, 0, 5)]


def test_a_failed_load_is_computed_instead():
    connector = ScriptedConnector(num_loadable=8)
    rig = Rig(connector=connector)
    rig.add("a", [1] * 10, max_tokens=2)
    rig.scheduler.schedule()
    connector.ended = [KvTransferEnd(connector.loads[0].transfer_id, ok=False)]
    assert shape(rig.step()[0]) == [(1, 0, 10)]


def test_the_last_token_is_computed_even_if_all_could_be_loaded():
    connector = ScriptedConnector(num_loadable=8)
    rig = Rig(connector=connector)
    rig.add("a", [1] * 8, max_tokens=2)
    rig.scheduler.schedule()
    assert connector.loads[0].token_ids == [1] * 4


def test_aborting_during_a_load_keeps_the_blocks_until_it_ends():
    connector = ScriptedConnector(num_loadable=8)
    rig = Rig(connector=connector)
    rig.add("a", [1] * 10, max_tokens=2)
    rig.scheduler.schedule()
    rig.scheduler.abort("a")
    assert rig.scheduler.take_deltas()[0].finish_reason is FinishReason.CANCELLED
    assert rig.kv.usage().num_owned == 2
    connector.ended = [KvTransferEnd(connector.loads[0].transfer_id)]
    rig.scheduler.schedule()
    assert rig.kv.usage().num_owned == 0
    assert not rig.scheduler.has_work


def test_full_blocks_are_saved_and_held_until_the_save_ends():
    connector = ScriptedConnector()
    rig = Rig(connector=connector)
    rig.add("a", [1] * 9, max_tokens=1)
    rig.run()
    (save,) = connector.saves
    assert (save.token_ids, save.first_block, save.block_ids) == ([1] * 8, 0, ([0, 1],))
    assert save.namespace == ("", "", "", "t", "")
    assert rig.scheduler.held_blocks == [0, 1]
    assert rig.kv.usage().num_owned == 2
    connector.ended = [KvTransferEnd(save.transfer_id)]
    rig.scheduler.schedule()
    assert rig.kv.usage().num_owned == 0
    assert rig.kv.pool.cached_ids == (1, 0)


def test_saves_under_way_are_bounded(monkeypatch):
    monkeypatch.setattr("penstock.engine.scheduler.transfers.MAX_SAVES", 1)
    connector = ScriptedConnector()
    rig = Rig(connector=connector)
    rig.add("a", [1] * 4, max_tokens=12)
    rig.run()
    assert len(connector.saves) == 1


def test_what_others_have_saved_already_is_not_saved_again():
    connector = ScriptedConnector()
    rig = Rig(connector=connector)
    rig.add("a", [1] * 9, max_tokens=1)
    rig.run()
    rig.add("b", [1] * 9, max_tokens=1)
    rig.run()
    assert len(connector.saves) == 1
