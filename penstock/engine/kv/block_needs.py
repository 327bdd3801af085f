"""How many blocks answers need: arithmetic for whoever admits requests, sizes the pool or draws up a load."""


def num_blocks_needed(
    num_tokens: int,
    *,
    num_shared_tokens: int,
    n: int,
    windows: tuple[int | None, ...],
    block_size: int,
) -> int:
    """Most blocks that `n` answers hold at once when each computes `num_tokens`, one token a step.

    Args:
        num_tokens: tokens with KV in each answer, its prompt included.
        num_shared_tokens: prompt tokens, whose whole blocks the answers share.
        n: number of answers.
        windows: window of each cache group, None for full attention.
        block_size: tokens in a block.

    Returns:
        Blocks, all groups together.
    """
    own = -(-num_tokens // block_size)
    shared = num_shared_tokens // block_size
    total = 0
    for window in windows:
        if window is None:
            total += shared + n * (own - shared)
        else:
            # The window's w tokens may straddle one block more than they fill.
            total += n * min(own, (window - 2 + block_size) // block_size + 1)
    return total
