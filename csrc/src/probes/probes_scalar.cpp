// The probes for any CPU of the architecture.
#include "read.inl"

namespace penstock {

const ProbeKernels& probe_kernels_scalar() {
    static constexpr ProbeKernels kernels{read_streamwise, nullptr, nullptr, burst_f32};
    return kernels;
}

}  // namespace penstock
