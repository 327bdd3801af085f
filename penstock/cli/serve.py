"""x."""

from penstock.cli.settings import ServeSettings


def serve_forever(model: str | None, *, settings: ServeSettings) -> int:
    """X."""
    print(model, settings)
    return 0
