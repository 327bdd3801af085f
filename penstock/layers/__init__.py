"""The parts of a model that hold parameters: linear, norm, rope, embedding, attention, MLP, experts.

Plain objects over tensors and a kernel set: no autograd, no module tree, no loading. `models` builds
them; they call `kernels/ops`.
"""
