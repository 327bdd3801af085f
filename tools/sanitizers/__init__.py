"""The C++ kernels under the compiler's sanitizers: `python -m tools.sanitizers address|thread`.

`__main__` builds the extension with the checks in and runs the kernels' tests on it; `sanitized_extension` is
the pytest plugin that puts that build in the place of the installed one.
"""
