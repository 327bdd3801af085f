"""Which samplers go with a set of kernels. Whoever makes a runner asks."""

from penstock.engine.sampling.native_sampler import NativeSampler
from penstock.engine.sampling.ports import DeviceSampler
from penstock.engine.sampling.sampler import Sampler
from penstock.kernels.ops import KernelSet
from penstock.models.interface import LoadedModel


def host_sampler(kernels: KernelSet) -> Sampler:
    """Draws from logits on the host, on the threads of the kernels if they have their own."""
    if not kernels.has_own_threads:
        return Sampler()
    # Imported here: it needs the extension module, which is there if such kernels are.
    from penstock.kernels.cpu.kernel_set import NativeKernels

    assert isinstance(kernels, NativeKernels)
    return Sampler(native=NativeSampler(kernels.machine.pool, isa=kernels.machine.isa))


def device_sampler(loaded: LoadedModel) -> DeviceSampler | None:
    """Draws where a queue leaves the logits; None for a model whose passes return with their results."""
    if not loaded.is_queued:
        return None
    # Imported here: it needs triton, which is there if such kernels are; no others run behind a queue.
    from penstock.engine.sampling.triton_sampler import TritonSampler

    return TritonSampler()
