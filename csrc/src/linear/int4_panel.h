// Where an int4 panel's values and scales lie, and what its groups look like to the kernels.
#pragma once

#include <algorithm>

#include "float16.h"
#include "penstock/linear.h"

namespace penstock {

struct Int4Panel {
    const std::uint8_t* values;  // 128 bytes for eight inputs of 32 features
    const Float16* scales;       // [groups][32]
    int inputs;                  // padded
    int group_size;

    // The first input behind the group that begins at k (the last group may be half a group).
    [[gnu::always_inline]] int group_end(int k) const { return std::min(k + group_size, inputs); }
};

[[gnu::always_inline]] inline Int4Panel int4_panel(const Matrix& w, int panel) {
    return {reinterpret_cast<const std::uint8_t*>(w.values.data()) + panel * w.panel_bytes(),
            reinterpret_cast<const Float16*>(w.scales.data()) +
                static_cast<std::int64_t>(panel) * w.num_groups() * panel_features,
            w.padded_inputs, w.group_size};
}

// -8 * sum of the row's values [first, end): what the stored nibbles (q + 8) have too much.
[[gnu::always_inline]] inline std::int32_t int4_offset(const std::int32_t* sums, int first, int end) {
    std::int32_t sum = 0;
    for (int g = first / sum_group; g < end / sum_group; ++g) sum += sums[g];
    return -8 * sum;
}

}  // namespace penstock
