"""Penstock beside its peers: the same checkpoint and workload, in turns, in one run.

`scenarios` says what is asked, `peers` how each engine is started, `checkpoints` makes the forms of the
weights that they read, `contender` starts one and asks it, `bound` says what the machine could do, `figures`
turns what was seen into numbers, `comparison` takes turns, `report` keeps the record and prints it. Peers
live in environments of their own (`make bench-peers`); nothing of them is imported here. `runners` are
scripts for the peers that have no server: they run under the peer's own Python and import nothing of ours.
"""
