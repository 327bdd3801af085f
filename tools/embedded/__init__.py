"""Makes the embedded model: tokenizer, instruction set, training, export and evaluation.

Nothing in the served package imports this; it is run by hand, see README.md beside this file.
"""
