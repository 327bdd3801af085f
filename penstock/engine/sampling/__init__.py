"""Choosing tokens: pure passes over logits `[rows, vocab]` float32, composed in `sampler` in a written order.

It knows neither models nor blocks, and no batch: what a row draws depends on that row alone. `engine/runner`
calls it.
"""
