// The tables of attention.h, by instruction set. Private to this folder.
#pragma once

#include "penstock/attention.h"

namespace penstock {

const AttentionKernels& attention_kernels_scalar();
const AttentionKernels& attention_kernels_avx2();
const AttentionKernels& attention_kernels_avx512();
const AttentionKernels& attention_kernels_amx();
const AttentionKernels& attention_kernels_amx_emulated();

}  // namespace penstock
