"""Layers of one kind form a cache group with its own block table over the one pool.

One block id means one byte-uniform slab: `layers_per_group` layers of `block_size` token slots, keys
and values. Layer j of a group uses slab `slab_idx[layer]`, so that blocks of different groups have the
same size and any free block serves any group.

Example: Gemma 3 with 26 layers, five sliding layers to each full one: 22 sliding, 4 full. Slabs: 4.
The full layers are one group of 4, the sliding ones five groups of 4 and one of 2 (two slabs of its
blocks stay unused: the price of uniformity).
"""

from collections.abc import Sequence

import msgspec


class CacheGroupSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One cache group."""

    layers: tuple[int, ...]
    """Model layer indices; position in the tuple is the slab index."""
    window: int | None = None
    """A token attends to itself and the `window - 1` before it; None for full attention."""


class CacheLayout(msgspec.Struct, frozen=True, kw_only=True):
    """How a model's layers share the pool."""

    groups: tuple[CacheGroupSpec, ...]
    num_slabs: int
    """Layers per block: the size of the largest group."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Window of each group, in order."""
        return tuple(group.window for group in self.groups)


def make_cache_layout(layer_windows: Sequence[int | None]) -> CacheLayout:
    """Group the layers of a model by window.

    Args:
        layer_windows: for each layer its window in tokens, or None for full attention.

    Returns:
        Groups of at most as many layers as the rarest kind has, full attention first.
    """
    by_window: dict[int | None, list[int]] = {}
    for layer, window in enumerate(layer_windows):
        by_window.setdefault(window, []).append(layer)
    num_slabs = min(len(layers) for layers in by_window.values())
    groups = [
        CacheGroupSpec(layers=tuple(layers[i : i + num_slabs]), window=window)
        for window, layers in sorted(by_window.items(), key=lambda item: (item[0] is not None, item[0] or 0))
        for i in range(0, len(layers), num_slabs)
    ]
    return CacheLayout(groups=tuple(groups), num_slabs=num_slabs)
