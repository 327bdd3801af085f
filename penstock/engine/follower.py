"""What a rank beside the first does, however it gets its messages.

It loads its part of the model and computes every plan that the first rank sends, in their order; it draws
nothing and answers nobody. `rank_process` runs it in a process of its own.
"""

from collections.abc import Callable

from penstock.core.error_info import error_to_info
from penstock.core.errors import PenstockError
from penstock.engine.loading import load_part
from penstock.engine.rank_wire import (
    FromRank,
    RankBuild,
    RankFailed,
    RankLoaded,
    RankStart,
    RankStep,
    RankStop,
    RankWarmUp,
    ToRank,
)
from penstock.engine.ranks import make_following_runner
from penstock.engine.runner.runner import Runner
from penstock.kernels.devices import choose_device
from penstock.models.interface import LoadedModel
from penstock.parallel.rank import Rank


class Follower:
    """See the module."""

    def __init__(
        self,
        *,
        receive: Callable[[], ToRank],
        send: Callable[[FromRank], None],
        join: Callable[[RankStart], Rank],
    ) -> None:
        """Do nothing yet.

        Args:
            receive: the next message of the first rank; waits for it.
            send: carries an answer to it.
            join: meets the other ranks.
        """
        self._receive = receive
        self._send = send
        self._join = join

    def run(self) -> bool:
        """Start, then compute until `RankStop`; False if it could not start: the first rank has been told."""
        start = self._receive()
        assert isinstance(start, RankStart), "the first message is RankStart"
        try:
            rank = self._join(start)
            config = start.config
            chosen = choose_device(config.device, kernels=config.kernels, index=rank.index)
            loaded = load_part(config, rank=rank, device=chosen.device)
        except PenstockError as error:
            self._send(RankFailed(error_to_info(error)))
            return False
        self._send(RankLoaded(loaded.weights_bytes))
        self._follow(start, loaded)
        return True

    def _follow(self, start: RankStart, loaded: LoadedModel) -> None:
        build = self._receive()
        if isinstance(build, RankStop):
            return
        assert isinstance(build, RankBuild), "the second message is RankBuild"
        runner = make_following_runner(start.config, loaded, num_blocks=build.num_blocks)
        while not isinstance(message := self._receive(), RankStop):
            _obey(runner, message)


def _obey(runner: Runner, message: ToRank) -> None:
    match message:
        case RankStep(plan):
            runner.launch(plan)
        case RankWarmUp() as limits:
            runner.warm_up(
                max_num_seqs=limits.max_num_seqs,
                max_num_batched_tokens=limits.max_num_batched_tokens,
                max_model_len=limits.max_model_len,
            )
        case _:
            raise AssertionError(f"a rank that has started is not told {type(message).__name__}")
