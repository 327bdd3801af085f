"""Operations for CUDA devices in Triton, with cuBLAS through torch for dense products.

The same kernels run in Triton's interpreter on a CPU, which is how tests check them without a device:
`TRITON_INTERPRET=1` must be set before triton is imported. `kernels/registry` builds the home; `availability`
can be read where triton is not installed, the other files cannot.
"""
