// The cache's shape, and which kernels run. See attention.h.
#include "penstock/attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace penstock {

namespace {

constexpr int head_dim_min = 32, head_dim_max = 256, head_dim_step = 16;

std::int64_t value_bytes(KvFormat format) { return format == KvFormat::bf16 ? 2 : 1; }

}  // namespace

KvFormat kv_format_named(std::string_view name) {
    if (name == "bf16") return KvFormat::bf16;
    if (name == "int8") return KvFormat::int8;
    throw std::invalid_argument("kv_format must be bf16 or int8, not " + std::string(name));
}

int KvShape::granules_per_block() const { return block_size / granule_tokens; }

std::int64_t KvShape::granule_bytes() const {
    const std::int64_t scales = format == KvFormat::int8 ? granule_tokens * sizeof(float) : 0;
    return granule_tokens * head_dim * value_bytes(format) + scales;
}

std::int64_t KvShape::head_bytes() const { return granules_per_block() * granule_bytes(); }

std::int64_t KvShape::block_bytes() const { return num_kv_heads * head_bytes(); }

void KvShape::check() const {
    if (block_size < granule_tokens || block_size % granule_tokens != 0) {
        throw std::invalid_argument("block_size must be a multiple of 16, not " + std::to_string(block_size));
    }
    if (num_kv_heads < 1) {
        throw std::invalid_argument("num_kv_heads must be 1 or more, not " + std::to_string(num_kv_heads));
    }
    if (head_dim < head_dim_min || head_dim > head_dim_max || head_dim % head_dim_step != 0) {
        throw std::invalid_argument("head_dim must be a multiple of 16 from 32 to 256, not " +
                                    std::to_string(head_dim));
    }
}

// The largest of: vectors (7 rows of scores and weights, sums of 16 lanes a row, one step's values), and
// tiles (tiles.inl: 32 rows of scores and weights of a part, its keys and twice its values, 16 rows of out).
std::size_t attend_scratch_bytes(int head_dim) {
    const auto dims = static_cast<std::size_t>(head_dim);
    const std::size_t rows = 7 * 64 * (4 + 4), sums = max_tile_rows * 64;
    const std::size_t vectors = rows + sums + 64 + 4 * granule_tokens * dims * 2 + 64;
    const std::size_t tile_rows = 32 * ((part_tokens + 16) * 4 + (part_tokens + 32) * 2);
    const std::size_t tiles =
        tile_rows + std::size_t{3} * part_tokens * ((dims + 31) / 32 * 32) * 2 + 16 * dims * 4;
    return std::max(vectors, tiles);
}

const AttentionKernels& attention_kernels(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::amx) return attention_kernels_amx();
    if (isa == Isa::amx_emulated) return attention_kernels_amx_emulated();
    if (isa == Isa::avx512) return attention_kernels_avx512();
    if (isa == Isa::avx2) return attention_kernels_avx2();
#else
    (void)isa;
#endif
    return attention_kernels_scalar();
}

}  // namespace penstock
