"""One step ahead: what may be planned while the outcome of the step before is not known.

With `async_scheduling` step n + 1 is planned before step n is applied. A sequence that step n draws a token
for then goes on with that token, unknown as it is:

```
token_ids  [0 ......................... num_tokens)
step n      computes the last of them              draws token t, place num_tokens
step n + 1  computes t, PENDING_TOKEN in the plan   draws the token behind it
```

What cannot be known ahead, that t ends the answer, costs one token computed in vain: its draw is void, its
slot lies beyond what the prefix tree ever sees, and its blocks are free after step n + 1.

The whole engine waits for the result of a step (`needs_result`), and then goes on as it does without
asynchrony, if the step

- holds a beam: all beams must be known before one goes on;
- holds an answer that may carry drafts: a guess follows a known token, and how many tokens it gains is open;
- found no block, or a waiting request no seat, but by preempting somebody: who is in a step cannot be.

It waits as a whole because a sequence that skipped every second step would read all weights for half a
batch. Answers that share a prompt skip one step, between the prompt's last chunk and their fork. Everything
else goes ahead: histories, seeds and grammars are in place when a draw is made, however early its step was
planned.

Called by `planner`.
"""

from penstock.engine.scheduler.request import Sequence


def can_go_ahead(seq: Sequence, *, max_model_len: int) -> bool:
    """True if the token that is being drawn for `seq` can be computed next, as far as lengths tell."""
    group = seq.group
    return (
        seq.num_pending_tokens == 1
        and group.beams is None
        and seq.num_outputs + 1 < group.request.max_tokens
        and seq.num_tokens + 1 < max_model_len
    )


def needs_result(seq: Sequence, *, speculates: bool) -> bool:
    """True if nothing may be planned before the step that draws for `seq` is applied; see the module."""
    group = seq.group
    return group.beams is not None or (speculates and group.request.params.can_speculate)
