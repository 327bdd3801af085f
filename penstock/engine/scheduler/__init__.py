"""Why a request runs or waits: the scheduler, its policies, its cost model and its admission rule.

Pure: the clock and the randomness come from outside and nothing does I/O, so the simulator runs this very
code. Called by `engine/core`; what it decides leaves as a `StepPlan` (`plan.py`), the one seam to the runner.
"""
