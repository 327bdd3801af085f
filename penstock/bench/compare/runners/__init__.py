"""Scripts that run under a peer's own Python: they may import that peer and the standard library only."""
