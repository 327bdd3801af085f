"""The native home: C++ kernels (`csrc/`), called one by one or as a recorded pass of a whole model.

`kernel_set` is the home, `tape` the recorded operations, `recorder` what writes them down, `passes` what
rewrites them, `emission` what hands them to the extension module `_native`. `registry` builds the home.
"""
