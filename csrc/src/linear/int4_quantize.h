// A group of float32 weights to int4, by instruction set; all give the same bits. Called by pack_int4.cpp.
#pragma once

#include <cstdint>

#include "float16.h"

namespace penstock {

// Takes a whole group (zeros behind the last input), all finite and at most 458,528 in magnitude. Returns the
// scale and writes a word for eight inputs: byte j is input j below and input j + 4 above.
using QuantizeGroup = Float16(const float* values, std::uint32_t* words);

struct Int4Quantize {
    QuantizeGroup* group_32;
    QuantizeGroup* group_64;
    QuantizeGroup* group_128;
};

const Int4Quantize& int4_quantize_scalar();
[[gnu::weak]] const Int4Quantize& int4_quantize_avx2();
[[gnu::weak]] const Int4Quantize& int4_quantize_avx512();

}  // namespace penstock
