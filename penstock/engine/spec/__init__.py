"""Speculative decoding: who guesses tokens ahead, and how guesses are verified.

`ngram` guesses from the sequence's own text and is pure; the scheduler calls it through
`scheduler/drafting`. Models that guess run in the runner (`proposer`). `verify` decides which guesses stand.
"""
