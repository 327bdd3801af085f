"""Which layers attend through a sliding window, as configs say it.

New configs list `layer_types`; older ones follow a rule of their family, which the caller passes.
"""

from collections.abc import Callable

from penstock.models.config import ConfigReader

KINDS = ("full_attention", "sliding_attention")


def read_layer_windows(
    reader: ConfigReader, *, num_layers: int, window: int | None, is_sliding: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """The window of each layer.

    Args:
        reader: the `config.json`.
        num_layers: how many there are.
        window: of the sliding layers, in tokens; None if the model has none.
        is_sliding: the family's rule by layer index, used where the config lists no `layer_types`.

    Returns:
        For each layer `window`, or None for full attention.

    Raises:
        CheckpointError: `layer_types` has another length, an unknown word, or a sliding layer without window.
    """
    if not reader.has("layer_types"):
        return tuple(window if is_sliding(i) else None for i in range(num_layers))
    kinds = reader.texts("layer_types")
    if len(kinds) != num_layers or not set(kinds) <= set(KINDS):
        raise reader.wrong("layer_types", f"{num_layers} words out of {', '.join(KINDS)}")
    if window is None and "sliding_attention" in kinds:
        raise reader.wrong("sliding_window", "a window in tokens, since layer_types has sliding layers")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
