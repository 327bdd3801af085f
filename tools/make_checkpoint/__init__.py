"""Makes a seeded random checkpoint of any shape, with a tokenizer of its full vocabulary.

Benchmarks and tests run on it without downloads. Nothing in the served package imports it.
"""
