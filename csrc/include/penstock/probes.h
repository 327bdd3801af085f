// What this machine can do at best: the limits that every measurement is compared with.
#pragma once

#include <cstdint>

#include "penstock/isa.h"
#include "penstock/pool.h"

namespace penstock {

// Bytes a second: the best of `passes` passes of all threads over `num_bytes` in huge pages, each thread
// reading several streams. num_bytes well above the last cache, at least 1 MiB a thread.
double read_bandwidth(Pool& pool, std::int64_t num_bytes, int passes);

enum class MultiplyType : int { bf16, int8, f32 };

// Operations a second (a multiply-add is two) of all threads from registers alone, for about `seconds`.
// Throws std::invalid_argument where the instruction set has no such instruction that runs on this machine's
// own units (amx_emulated).
double multiply_peak(Pool& pool, Isa isa, MultiplyType type, double seconds);

// One burst of independent multiply-adds; returns the number of operations. `sink` keeps the results alive.
using Burst = double (*)(float* sink);

struct ProbeKernels {
    // XOR of all bytes of [data, data + num_bytes), num_bytes a multiple of 4096, read as several streams.
    std::uint64_t (*read)(const std::byte* data, std::int64_t num_bytes);
    Burst bf16;  // null where there is none
    Burst int8;
    Burst f32;
};

}  // namespace penstock
