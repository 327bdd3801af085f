// The tables of dense.h, by instruction set. Private to this folder.
#pragma once

#include "penstock/dense.h"

namespace penstock {

const DenseKernels& dense_kernels_scalar();
const DenseKernels& dense_kernels_avx2();
const DenseKernels& dense_kernels_avx512();

}  // namespace penstock
