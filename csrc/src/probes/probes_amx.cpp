// The probes for the tiles: four accumulators of 16 x 16, each a product of tiles of 16 rows of 64 bytes.
#include <immintrin.h>

#include "kernels.h"

namespace penstock {
namespace {

// The format of LDTILECFG's operand, palette 1 (Intel SDM, volume 2A).
struct alignas(64) TileConfig {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t num_rows[16] = {};
};

constexpr int num_tiles = 8;
constexpr int burst_rounds = 2000;
constexpr int products_a_round = 4;

// Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 columns, all zero: the units take the same time for every
// value.
void configure() {
    TileConfig config;
    for (int i = 0; i < num_tiles; ++i) {
        config.row_bytes[i] = 64;
        config.num_rows[i] = 16;
    }
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
}

double burst_bf16(float* sink) {
    (void)sink;
    configure();
    for (int round = 0; round < burst_rounds; ++round) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return 2.0 * 16 * 16 * 32 * products_a_round * burst_rounds;
}

double burst_int8(float* sink) {
    (void)sink;
    configure();
    for (int round = 0; round < burst_rounds; ++round) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_release();
    return 2.0 * 16 * 16 * 64 * products_a_round * burst_rounds;
}

}  // namespace

const ProbeKernels& probe_kernels_amx() {
    static const ProbeKernels kernels{probe_kernels_avx512().read, burst_bf16, burst_int8,
                                      probe_kernels_avx512().f32};
    return kernels;
}

}  // namespace penstock
