// Rows times one panel with tiles; included by <format>_amx.cpp and <format>_amx_emulated.cpp after
// tiles/tile.h.
//
// ```
//              B0: 16 features   B1: 16 features        a step: 64 bytes of each row (32 bf16 or 64 int8 inputs),
// A0: 16 rows     C0                C1                  2 KiB of the panel: two B tiles side by side, 16 rows of
// A1: 16 rows     C2                C3                  64 bytes each at a stride of 128 (matrix.h)
// ```
//
// A step is 4 products on 4 loaded tiles: 64 cycles of the multiplier against 32 of the load ports. Each C
// waits for its last product only every fourth one (64 cycles; the product's latency is 52).
//
// **Blocks of K.** Over all of K, both operands would come from L2 at 64 bytes a cycle, all that it can give.
// So K is cut into blocks of `block_steps`: the block's part of the panel (16 KiB) stays in L1 for all rows
// of the call, C goes through `out` (12 KiB for the driver's 96 rows, in L1 too), and only the rows stream
// from L2, at 32 bytes a cycle and fetched ahead. Up to 32 rows there is nothing to reuse: one block.
//
// **Rows that are no multiple of 16.** From 16 rows on, every tile has 16: the last one is moved up so that
// it ends with the last row. The rows that it shares with its neighbour are computed twice, to the same bits
// (a row of C depends on its row of A alone). Below 16, the tiles have as many rows as there are. So nothing
// outside the rows is read or written.
//
// **Order over K**: one product per 64 bytes, rising, into one sum: the same for every number of rows.

namespace penstock {
namespace {

constexpr int step_bytes = 64;          // of a row of x
constexpr int panel_step_bytes = 2048;  // of the panel: 32 features
constexpr int panel_stride = 128;       // from a row of a B tile to the next
constexpr int sums_stride = panel_features * 4;

// A third of the L1 cache (48 KiB) for the panel's part.
constexpr int block_steps = 8;
// Rows are fetched into L1 this many steps before they are loaded: 128 cycles, where L2 answers in 16 and is
// shared with the panel's stream.
constexpr int row_steps_ahead = 2;
// Few rows: the panel comes from memory at about 6 bytes a cycle; 4 KiB ahead (two steps) is 680 cycles,
// twice its latency.
constexpr int panel_bytes_ahead = 4096;

struct Bf16Dot {
    template <int C, int A, int B>
    static void dot() {
        tile::dot_bf16<C, A, B>();
    }
};

struct Int8Dot {
    template <int C, int A, int B>
    static void dot() {
        tile::dot_int8<C, A, B>();
    }
};

PENSTOCK_TILE void fetch(const void* address) { __builtin_prefetch(address, 0, 3); }
PENSTOCK_TILE void fetch_to_l2(const void* address) { __builtin_prefetch(address, 0, 2); }

// What comes after this panel in memory, fetched into L2 while this one is multiplied: a sixteenth of a panel
// is `share_bytes`, one line in two for each step (the line beside it comes along). Each pair of row tiles
// fetches its own `shares`: one, so that 512 rows fetch it all at a third of the memory's pace beside the
// rows' stream; eight where there are two pairs only, which wait for memory anyway.
struct Ahead {
    const std::byte* panel;  // the next one's line of the block's first step
    std::int64_t share_bytes;
    std::int64_t first_pair;
    int shares;
};
constexpr int panel_shares = panel_step_bytes / panel_stride;

PENSTOCK_TILE const std::byte* first_share(const Ahead& ahead, int first_row) {
    return ahead.panel + (ahead.first_pair + first_row / (2 * tile_rows_max)) * ahead.shares % panel_shares *
                             ahead.share_bytes;
}

// One block of K for one call.
struct Block {
    const std::byte* rows;  // the first row's first byte of the block
    std::int64_t row_bytes;
    const std::byte* panel;
    int num_steps;
    bool is_first;  // sums start at 0, else at what stands in `out`
    bool is_end;   // of the call
    bool is_last;  // of all K
    Ahead ahead;
};

// 32 rows ahead: 16 tiles' lines.
PENSTOCK_TILE void fetch_rows(const std::byte* ahead, std::int64_t row_bytes) {
#pragma GCC unroll 32
    for (int r = 0; r < 2 * tile_rows_max; ++r) fetch(ahead + r * row_bytes);
}

PENSTOCK_TILE void fetch_panel(const std::byte* ahead) {
#pragma GCC unroll 32
    for (int line = 0; line < panel_step_bytes; line += 64) fetch(ahead + line);
}

// Rows [first, first + 16) and [second, second + 16), which may overlap. `next`: the rows that come after
// them.
template <class Dot>
[[gnu::noinline]] void multiply_two(const Block& block, int first, int second, const std::byte* next,
                                    float* out) {
    float* low = out + first * panel_features;
    float* high = out + second * panel_features;
    if (block.is_first) {
        tile::zero<0>(), tile::zero<1>(), tile::zero<2>(), tile::zero<3>();
    } else {
        tile::load<0>(low, sums_stride), tile::load<1>(low + 16, sums_stride);
        tile::load<2>(high, sums_stride), tile::load<3>(high + 16, sums_stride);
    }
    const std::int64_t stride = block.row_bytes;
    const std::byte* a0 = block.rows + first * stride;
    const std::byte* a1 = block.rows + second * stride;
    const std::byte* w = block.panel;
    const std::byte* far = first_share(block.ahead, first);
    for (int step = 0; step < block.num_steps; ++step) {
        const int ahead = step + row_steps_ahead - block.num_steps;
        tile::load<4>(a0 + step * step_bytes, stride);
        tile::load<6>(w, panel_stride);
        Dot::template dot<0, 4, 6>();
        tile::load<7>(w + step_bytes, panel_stride);
        Dot::template dot<1, 4, 7>();
        tile::load<5>(a1 + step * step_bytes, stride);
        Dot::template dot<2, 5, 6>();
        Dot::template dot<3, 5, 7>();
        fetch_rows(ahead < 0 ? a0 + (step + row_steps_ahead) * step_bytes : next + ahead * step_bytes,
                   stride);
        for (int share = 0; share < block.ahead.shares; ++share)
            fetch_to_l2(far + share * block.ahead.share_bytes);
        w += panel_step_bytes;
        far += panel_stride;
    }
    tile::store<0>(low, sums_stride), tile::store<1>(low + 16, sums_stride);
    tile::store<2>(high, sums_stride), tile::store<3>(high + 16, sums_stride);
}

// At most 16 rows from `first` on, as many as the tiles are configured for; `sums` is their own.
template <class Dot, bool is_stored>
[[gnu::noinline]] void multiply_one(const Block& block, int first, float* sums) {
    if (block.is_first) {
        tile::zero<0>(), tile::zero<1>();
    } else {
        tile::load<0>(sums, sums_stride), tile::load<1>(sums + 16, sums_stride);
    }
    const std::byte* a = block.rows + first * block.row_bytes;
    const std::byte* w = block.panel;
    for (int step = 0; step < block.num_steps; ++step) {
        tile::load<4>(a + step * step_bytes, block.row_bytes);
        tile::load<6>(w, panel_stride);
        Dot::template dot<0, 4, 6>();
        tile::load<7>(w + step_bytes, panel_stride);
        Dot::template dot<1, 4, 7>();
        if constexpr (is_stored) fetch_panel(w + panel_bytes_ahead);
        w += panel_step_bytes;
    }
    tile::store<0>(sums, sums_stride), tile::store<1>(sums + 16, sums_stride);
}

struct alignas(64) OneTile {
    float values[tile_rows_max * panel_features];
};

// Rows of a call by tiles: pairs of tiles, and what is left.
struct RowTiles {
    int num_rows;
    int pairs_end() const { return rest() > tile_rows_max ? num_rows : num_rows - rest(); }
    int rest() const { return num_rows % (2 * tile_rows_max); }
    bool has_one() const { return rest() > 0 && rest() <= tile_rows_max; }
    // The last tile ends with the last row.
    int one_first() const { return num_rows < tile_rows_max ? 0 : num_rows - tile_rows_max; }
};

// The rows that only the last tile has, from its own sums to their place.
void place_last(const RowTiles& rows, const OneTile& last, float* out) {
    if (rows.num_rows < tile_rows_max) return;
    const std::size_t count = static_cast<std::size_t>(rows.rest()) * panel_features;
    std::memcpy(out + rows.pairs_end() * panel_features, last.values + tile_rows_max * panel_features - count,
                count * sizeof(float));
}

// The last tile's sums so far, from where an earlier call left them.
void take_last(const RowTiles& rows, const float* out, OneTile& last) {
    if (!rows.has_one() || rows.num_rows < tile_rows_max) return;
    std::memcpy(last.values, out + rows.one_first() * panel_features, sizeof last.values);
}

// `finish(first, end)` is called once for all rows, 32 at a time, when their sums are complete: of a pair of
// tiles while the next pair's products are on their way.
template <class Dot, bool is_stored, class Finish>
void multiply_block(const Block& block, const RowTiles& rows, float* out, OneTile& last,
                    const Finish& finish) {
    constexpr int pair_rows = 2 * tile_rows_max;
    for (int first = 0; first < rows.pairs_end(); first += pair_rows) {
        const bool is_last = first + pair_rows >= rows.pairs_end();
        const int second = is_last ? rows.pairs_end() - tile_rows_max : first + tile_rows_max;
        const std::byte* next = is_last ? block.rows + block.num_steps * step_bytes
                                        : block.rows + (first + pair_rows) * block.row_bytes;
        multiply_two<Dot>(block, first, second, next, out);
        if (block.is_last && first > 0) finish(first - pair_rows, first);
    }
    const int unfinished = (rows.pairs_end() - 1) / pair_rows * pair_rows;
    if (rows.has_one()) {
        multiply_one<Dot, is_stored>(block, rows.one_first(),
                                     rows.num_rows < tile_rows_max ? out : last.values);
        if (block.is_end) place_last(rows, last, out);
    }
    if (!block.is_last) return;
    if (rows.pairs_end() > 0) finish(unfinished, rows.pairs_end());
    if (rows.has_one()) finish(rows.pairs_end(), rows.num_rows);
}

// A panel that lies in memory as the tiles read it.
struct StoredPanel {
    static constexpr bool is_stored = true;
    const std::byte* values;
    const std::byte* block(int step, int) const { return values + std::int64_t{step} * panel_step_bytes; }
};

// Steps [first, end) of a panel of `count`.
struct StepRange {
    int first;
    int end;
    int count;
};

// out [num_rows][32] = x rows times the panel: sums of Dot's type (float32 or int32), which `finish` may
// scale after the last step. A range that does not begin at 0 adds to the sums that stand in `out`.
template <class Dot, class Panel, class Finish>
void multiply_panel(const Operand& x, std::int64_t first_row, int num_rows, const Panel& panel,
                    const StepRange& range, float* out, const Finish& finish) {
    tile::configure_product(num_rows);
    const RowTiles rows{num_rows};
    const int num_steps = range.end - range.first;
    const int most_steps = Panel::is_stored && num_rows <= 2 * tile_rows_max ? num_steps : block_steps;
    Ahead ahead{};
    if constexpr (Panel::is_stored) {
        ahead = {panel.block(range.count + range.first, 0), std::int64_t{num_steps} * panel_stride,
                 first_row / (2 * tile_rows_max), num_rows > 4 * tile_rows_max ? 1 : panel_shares / 2};
    }
    OneTile last;
    if (range.first > 0) take_last(rows, out, last);
    for (int step = range.first; step < range.end; step += most_steps) {
        const int count = range.end - step < most_steps ? range.end - step : most_steps;
        const Block block{x.row<std::byte>(first_row) + step * step_bytes,
                          x.row_bytes,
                          panel.block(step, count),
                          count,
                          step == 0,
                          step + count == range.end,
                          step + count == range.count,
                          ahead};
        ahead.panel += count * panel_stride;
        multiply_block<Dot, Panel::is_stored>(block, rows, out, last, finish);
    }
}

}  // namespace
}  // namespace penstock
