"""Guided decoding: grammars compiled beside the step loop, a matcher for each answer, masks for each step.

The only room that knows llguidance. The scheduler sees a `Constraint`, the sampler sees masks.
"""
