"""The native home: C++ kernels, chosen by instruction set, run by one pool of threads."""
