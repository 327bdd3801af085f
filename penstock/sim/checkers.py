"""What must hold after every step, and at the end. Each checker raises `SimulationError` with the law.

They look at the engine from outside: tables, counts and deltas; they change nothing. Called by `simulator`
and by the property tests.
"""

from collections import Counter
from collections.abc import Iterable

from penstock.core.errors import GenerateError
from penstock.core.text import FinishReason, TokenLogprobs
from penstock.core.tokens import EngineRequest, Pooling, StepStats, TokenDelta
from penstock.engine.kv.block_table import SequenceBlocks
from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.kv.prefix_tree import NO_BLOCK, PrefixTree, TreeNode
from penstock.engine.scheduler.beams import BeamSearch, Hypothesis
from penstock.engine.scheduler.policy import PROMPT_WEIGHT, FairPolicy
from penstock.engine.scheduler.request import GroupState, SequenceGroup, derive_seed
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.sim.runner import START, draw_token, likeliest, next_digest, pooled_values, require


def check_pool(kv: KvManager, tables: Iterable[SequenceBlocks], *, held: Iterable[int]) -> None:
    """Every block is free, cached or owned, and has exactly as many holders as it counts.

    So nothing leaks: a request that has ended is not among `tables`, and owns nothing.
    """
    pool = kv.pool
    free, cached = set(pool.free_ids), set(pool.cached_ids)
    require(
        pool.num_free + pool.num_cached + pool.num_owned == pool.num_blocks, "free + cached + owned = total"
    )
    require(len(free) == pool.num_free, "a block is free twice")
    require(not free & cached, "a block is free and cached")
    holders = Counter(held)
    for blocks in tables:
        for table, head in zip(blocks.tables, blocks.heads, strict=True):
            require(all(block == NO_BLOCK for block in table[:head]), "a block behind the window is held")
            holders.update(table[head:])
    for block in range(pool.num_blocks):
        require(
            pool.ref_count(block) == holders[block],
            f"block {block} counts {pool.ref_count(block)} holders, has {holders[block]}",
        )
        require(
            (block in free or block in cached) == (holders[block] == 0), f"block {block} is free and held"
        )
        require(not (block in free and pool.is_in_tree(block)), f"block {block} is free and in the tree")


def check_sharing(kv: KvManager, groups: Iterable[SequenceGroup]) -> None:
    """A block is in two tables only if it is in the tree, or among the answers of one request."""
    owners: dict[int, SequenceGroup] = {}
    for group in groups:
        for seq in group.live:
            for block in (block for table in seq.blocks.tables for block in table if block != NO_BLOCK):
                other = owners.setdefault(block, group)
                require(
                    other is group or kv.pool.is_in_tree(block) or seq.blocks.has_lost_path,
                    f"block {block} is in two tables that share nothing",
                )


def check_tree(tree: PrefixTree, kv: KvManager) -> None:
    """The tree's nodes, counts and the pool's marks agree."""
    seen: list[int] = []
    num_nodes = 0
    stack: list[TreeNode] = list(tree.roots.values())
    while stack:
        node = stack.pop()
        num_nodes += node.root_of is None
        require(node.is_attached and not node.is_removable, "a dead node is in the tree")
        require(all(child.parent is node for child in node.children.values()), "a child has another parent")
        seen.extend(block for block in node.blocks if block != NO_BLOCK)
        stack.extend(node.children.values())
    require(num_nodes == tree.num_nodes, "number of nodes")
    require(len(seen) == len(set(seen)), "a block is in two nodes")
    num_marked = sum(kv.pool.is_in_tree(block) for block in range(kv.pool.num_blocks))
    require(all(kv.pool.is_in_tree(block) for block in seen), "a node has a block that is not marked")
    require(num_marked == len(seen), "a block is marked but in no node")


def check_groups(scheduler: Scheduler, *, max_preemptions: int, max_num_seqs: int) -> None:
    """Seats, protection from preemption, and each request in one state."""
    running = [group for group in scheduler.groups if group.state is GroupState.RUNNING]
    require(sum(len(group.live) for group in running) <= max_num_seqs, "more sequences than seats")
    for group in scheduler.groups:
        require(group.num_preemptions <= max_preemptions, "a protected request was preempted")
        for seq in group.live:
            num_known = seq.num_tokens + max(seq.num_inflight_drafts, seq.num_pending_tokens)
            require(seq.next_position <= num_known, "computed beyond what is known")
            num_needed = seq.num_prompt_tokens + max(0, group.request.max_tokens - 1)
            require(seq.next_position <= num_needed, "a token is computed that no answer can need")
            require(
                seq.num_inflight_drafts < max(1, seq.num_inflight_tokens), "drafts without a token before"
            )
        if group.state is GroupState.WAITING:
            require(all(seq.blocks.num_blocks == 0 for seq in group.live), "a waiting request holds blocks")


def check_tails(groups: Iterable[SequenceGroup], *, block_size: int) -> None:
    """A running sequence has no block behind its last token: rejected drafts give theirs back."""
    for group in groups:
        for seq in group.live if group.state is GroupState.RUNNING else ():
            num_filled = -(-seq.next_position // block_size)
            is_kept = seq.blocks.num_blocks > num_filled and not seq.is_held
            require(not is_kept, "a block is kept that holds no token")


def check_order(
    started: Iterable[SequenceGroup], waiting: Iterable[SequenceGroup], *, by_tenant: bool
) -> None:
    """Nobody starts before an older request of its queue, or of a higher tier.

    Exempt is an older one that is held back for a prefix that is being computed.
    """
    waiting = [group for group in waiting if not group.num_deferrals]
    for group in started:
        for other in waiting:
            same_queue = other.tier == group.tier and (
                not by_tenant or other.request.tenant_id == group.request.tenant_id
            )
            require(other.tier >= group.tier, "a lower tier started before a higher one")
            require(
                not same_queue or other.arrival_idx > group.arrival_idx, "a younger request started first"
            )


def check_fairness(
    policy: FairPolicy, started: Iterable[SequenceGroup], waiting: Iterable[SequenceGroup]
) -> None:
    """Who started belongs to a tenant that had received no more service than any who still waits.

    Compared are counters before the step's own charges, within one tier; whoever is held back for a prefix
    is exempt.
    """
    waiting = [group for group in waiting if not group.num_deferrals]
    charged: Counter[str] = Counter()
    for group in started:
        charged[group.request.tenant_id] += group.num_prompt_tokens - group.num_cached_tokens
    for group in started:
        tenant_id = group.request.tenant_id
        served_before = policy.served(tenant_id) - PROMPT_WEIGHT * charged[tenant_id]
        for other in waiting:
            is_passed = other.tier == group.tier and served_before > policy.served(other.request.tenant_id)
            require(not is_passed, f"{tenant_id} was served before {other.request.tenant_id}, who had less")


def check_stats(stats: StepStats) -> None:
    """The figures of a step agree with each other."""
    total = stats.num_blocks_free + stats.num_blocks_cached + stats.num_blocks_owned
    require(total == stats.num_blocks, "free + cached + owned = total in the figures")
    require(0 <= stats.num_slots_used <= stats.num_slots_owned, "more slots used than owned")
    require(stats.num_prompt_tokens <= stats.num_batched_tokens, "more prompt tokens than tokens")
    accepted = stats.num_accepted_tokens
    require(sum(accepted) <= stats.num_draft_tokens, "more drafts accepted than verified")
    require(list(accepted) == sorted(accepted, reverse=True), "a draft stands only behind one that stands")


class AnswerBook:
    """The deltas of one request as a client sees them; checks that it ends exactly once."""

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.token_ids: list[list[int]] = [[] for _ in range(request.params.n)]
        self.reasons: list[FinishReason | None] = [None] * request.params.n
        self.pooled: tuple[float, ...] | None = None
        self.is_over = False
        self.num_preemptions = 0

    def take(self, delta: TokenDelta) -> None:
        """Note a delta."""
        require(not self.is_over, f"{delta.request_id} got a delta after its last")
        require(
            self.reasons[delta.index] is None,
            f"{delta.request_id} answer {delta.index} went on after its end",
        )
        self.token_ids[delta.index].extend(delta.token_ids)
        self.reasons[delta.index] = delta.finish_reason
        self.pooled = delta.pooled
        self.is_over = delta.is_last
        if delta.error is not None:
            require(delta.error.kind == GenerateError.__name__, "a failure is a GenerateError")
        elif delta.stats is not None:
            require(None not in self.reasons, f"{delta.request_id} ended before all answers did")
            num_tokens = sum(map(len, self.token_ids))
            require(delta.stats.num_generated_tokens == num_tokens, "tokens streamed = tokens counted")

    def check_tokens(self, *, vocab_size: int, max_model_len: int) -> None:
        """Complete answers equal those of an uncontended run; cut ones are a beginning of it."""
        if self.request.pooling is not None:
            self._check_pooled(self.request.pooling)
            return
        seed = self.request.params.seed
        if seed is None:
            return
        if self.request.params.use_beam_search:
            self._check_search(vocab_size=vocab_size)
            return
        for index, token_ids in enumerate(self.token_ids):
            expected, reason = uncontended_answer(
                self.request,
                seed=derive_seed(seed, answer_idx=index),
                vocab_size=vocab_size,
                max_model_len=max_model_len,
            )
            if self.reasons[index] in (FinishReason.STOP, FinishReason.LENGTH):
                require(self.reasons[index] is reason, f"{self.request.request_id} ended for another reason")
                require(token_ids == expected, f"{self.request.request_id} has other tokens than when alone")
            else:
                require(token_ids == expected[: len(token_ids)], "a cut answer began with other tokens")

    def _check_pooled(self, pooling: Pooling) -> None:
        """A vector comes whole, and nothing else does."""
        require(not any(self.token_ids), f"{self.request.request_id} wanted a vector and got tokens")
        if self.reasons[0] is not FinishReason.STOP:
            require(self.pooled is None, "a request that was cut has no vector")
            return
        digests = [START]
        for token_id in self.request.prompt_token_ids:
            digests.append(next_digest(digests[-1], token_id))
        expected = pooled_values(digests[1:] if pooling.kind == "mean" else digests[-1:])
        require(self.pooled == expected, f"{self.request.request_id} has another vector than when alone")

    def _check_search(self, *, vocab_size: int) -> None:
        """All answers of a search come at its end, whole."""
        if any(reason not in (FinishReason.STOP, FinishReason.LENGTH) for reason in self.reasons):
            require(not any(self.token_ids), "a search that was cut tells nothing")
            return
        found = uncontended_search(self.request, vocab_size=vocab_size)
        told = [(answer.finish_reason, list(answer.token_ids)) for answer in found]
        require(
            told == list(zip(self.reasons, self.token_ids, strict=True)),
            f"{self.request.request_id} found other answers than when alone",
        )


def uncontended_search(request: EngineRequest, *, vocab_size: int) -> list[Hypothesis]:
    """What a search over the fake model finds when every beam is computed from its first token on."""
    search = BeamSearch(request=request, max_tokens=request.max_tokens)
    while True:
        for place, beam in enumerate(search.beams):
            digest = START
            for token_id in (*request.prompt_token_ids, *beam.token_ids):
                digest = next_digest(digest, token_id)
            top = likeliest(digest, num_top=search.num_candidates, vocab_size=vocab_size)
            search.offer(place, TokenLogprobs(top[0], top))
        if search.advance() is None:
            return search.finished[: request.params.n]


def uncontended_answer(
    request: EngineRequest, *, seed: int, vocab_size: int, max_model_len: int
) -> tuple[list[int], FinishReason]:
    """What the fake model answers when nothing shares, preempts or chunks: the obvious loop."""
    digest = START
    for token_id in request.prompt_token_ids:
        digest = next_digest(digest, token_id)
    outputs: list[int] = []
    eos = () if request.params.ignore_eos else request.eos_token_ids
    while True:
        token_id = draw_token(digest, seed=seed, output_idx=len(outputs), vocab_size=vocab_size)
        is_stop = token_id in (*eos, *request.params.stop_token_ids)
        if is_stop and len(outputs) >= request.params.min_tokens:
            return outputs, FinishReason.STOP
        outputs.append(token_id)
        digest = next_digest(digest, token_id)
        num_tokens = len(request.prompt_token_ids) + len(outputs)
        if len(outputs) == request.max_tokens or num_tokens == max_model_len:
            return outputs, FinishReason.LENGTH
