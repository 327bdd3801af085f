// The tables of probes.h, by instruction set. Private to this folder.
#pragma once

#include "penstock/probes.h"

namespace penstock {

const ProbeKernels& probe_kernels_scalar();
const ProbeKernels& probe_kernels_avx2();
const ProbeKernels& probe_kernels_avx512();
const ProbeKernels& probe_kernels_amx();

}  // namespace penstock
