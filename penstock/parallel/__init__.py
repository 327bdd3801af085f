"""Several ranks compute one model: who has which part, and how the parts are put together.

`layers` and `models` use it; how ranks are started is `engine/runner`'s to know.
"""
