// Attention over one part of the keys with tiles; included by kernels_amx.cpp and kernels_amx_emulated.cpp
// after tiles/tile.h and kernels.inl, whose rotation, writes, folding and finish it shares.
//
// A part (256 keys) is small enough to be one softmax: nothing is rescaled inside it. For 32 rows at a time
// (two tiles):
//
// ```
// scores  [32][256] float32   query [32][D] x keys      B tile: 32 dims of 16 tokens, a granule's own order
// weights [32][256] bf16      2^(score - max of the row), sum of the row           vectors
// out     [32][D]   float32   weights x values          B tile: 32 tokens of 16 dims, two granules one after the other
// ```
//
// Values are copied to make two granules neighbours (blocks may hold one); there the slots that no row sees
// become 0, since 0 times their NaN would not be 0. Keys are read where they lie, or copied too where they
// are int8 or where head_dim is no multiple of 32.
//
// **Every number of rows** is done with tiles, one row too: the tiles round as no vector instruction does,
// and a token's bits must not depend on the tokens computed with it. A decode of 7 query heads a KV head
// costs 128 products (2,048 cycles) a part, which takes 64 KiB of memory: 10,000 cycles.
//
// A row's numbers: scores sum over 32 dims at a time, out over 32 tokens at a time counted from the part's
// start; keys that only its neighbours see have weight 0, which changes no sum. Rows that are no multiple of
// 16: see tile_product.inl.
//
// Source: Dao et al., FlashAttention, 2022, algorithm 1.
namespace penstock {
namespace {

constexpr int part_granules = part_tokens / granule_tokens;
constexpr int group_rows = 2 * tile_rows_max;
// A row of scores and of weights, longer than a part: rows at a stride of 1024 bytes would share 4 sets of
// the L1 cache.
constexpr int score_stride = part_tokens + 16, weight_stride = part_tokens + 32;
constexpr int dims_of_step = 32, tokens_of_step = 32;

struct RowScratch {
    alignas(64) float scores[group_rows][score_stride];
    alignas(64) std::uint16_t weights[group_rows][weight_stride];
};

constexpr int padded_dims(int head_dim) {
    return (head_dim + dims_of_step - 1) / dims_of_step * dims_of_step;
}

// A thread's memory for a part: rows, then values, keys, values for one row, its out.
struct TileMemory {
    RowScratch& rows;
    std::byte* values;   // [16 granules], bf16
    std::byte* keys;     // [16 granules] of padded_dims, bf16
    std::byte* cleaned;  // like values
    float* out;          // [16][D]

    TileMemory(std::byte* at, int head_dim) : rows(*reinterpret_cast<RowScratch*>(at)) {
        const std::int64_t bytes = std::int64_t{part_tokens} * padded_dims(head_dim) * 2;
        values = at + sizeof(RowScratch);
        keys = values + bytes;
        cleaned = keys + bytes;
        out = reinterpret_cast<float*>(cleaned + bytes);
    }
};

// One or two tiles of rows, times two tiles of columns.
struct Product {
    const std::byte* a[2];
    std::int64_t a_stride;
    const std::byte* b[2];
    std::int64_t b_stride;
    std::int64_t b_step;  // bytes from one step's B tile to the next's; A's are 64 bytes apart
    int num_steps;
    float* c[2][2];       // [tile of rows][tile of columns]
    std::int64_t c_stride;
};

template <int row_tiles>
[[gnu::noinline]] void multiply_tiles(const Product& p) {
    const std::int64_t a_stride = p.a_stride, b_stride = p.b_stride, b_step = p.b_step;
    const std::byte *a0 = p.a[0], *a1 = p.a[1], *b0 = p.b[0], *b1 = p.b[1];
    tile::zero<0>(), tile::zero<1>();
    if constexpr (row_tiles == 2) tile::zero<2>(), tile::zero<3>();
    for (int left = p.num_steps; left > 0; --left) {
        tile::load<4>(a0, a_stride);
        tile::load<6>(b0, b_stride);
        tile::dot_bf16<0, 4, 6>();
        tile::load<7>(b1, b_stride);
        tile::dot_bf16<1, 4, 7>();
        if constexpr (row_tiles == 2) {
            tile::load<5>(a1, a_stride);
            tile::dot_bf16<2, 5, 6>();
            tile::dot_bf16<3, 5, 7>();
        }
        a0 += tile_row_bytes_max, a1 += tile_row_bytes_max, b0 += b_step, b1 += b_step;
    }
    tile::store<0>(p.c[0][0], p.c_stride), tile::store<1>(p.c[0][1], p.c_stride);
    if constexpr (row_tiles == 2)
        tile::store<2>(p.c[1][0], p.c_stride), tile::store<3>(p.c[1][1], p.c_stride);
}

void multiply(const Product& p, int row_tiles) {
    row_tiles == 2 ? multiply_tiles<2>(p) : multiply_tiles<1>(p);
}

// What a call reads: granules [from, to) of the part, as the tiles want them.
struct PartView {
    int begin;  // position of granule 0's first token
    int from;
    int to;
    const std::byte* keys[part_granules];     // bf16, ready to be tiles
    const std::byte* key_scales[part_granules];    // granules as stored: where the scales are
    const std::byte* value_scales[part_granules];
    std::byte* values;
};

// Rows [row[0], row[0] + num) and, where there are two tiles, [row[1], row[1] + num); granules [from, to) are
// theirs.
struct RowGroup {
    int tiles;
    int row[2];
    int num;
    int from;
    int to;
    int row_at(int i) const { return row[i / tile_rows_max] + i % tile_rows_max; }
};

// ---- keys and values of the part

// int8 granule to bf16, [pairs][2] of `vectors` vectors; exact.
void widen_granule(const std::byte* from, int num_values, std::byte* to) {
    for (int i = 0; i < num_values; i += 2 * lanes) {
        const Pairs pairs = load_int8_pairs(from + i);
        std::memcpy(to + 2 * i, &pairs, sizeof pairs);
    }
}

template <class Kv>
void copy_granule(const std::byte* from, int head_dim, std::byte* to) {
    if constexpr (Kv::is_scaled) {
        widen_granule(from, granule_tokens * head_dim, to);
    } else {
        std::memcpy(to, from, static_cast<std::size_t>(granule_tokens * head_dim) * 2);
    }
}

// Keys as B tiles of whole 32 dims.
template <class Kv>
const std::byte* ready_keys(const std::byte* from, int head_dim, std::byte* to) {
    const int padded = padded_dims(head_dim);
    if (!Kv::is_scaled && padded == head_dim) return from;
    copy_granule<Kv>(from, head_dim, to);
    const auto bytes = [](int dims) { return static_cast<std::size_t>(granule_tokens * dims) * 2; };
    std::memset(to + bytes(head_dim), 0, bytes(padded) - bytes(head_dim));
    return to;
}

// Zeros for tokens of the granule that begins at `position` outside [first, last].
void clear_unseen(std::byte* granule, int head_dim, int position, int first, int last) {
    for (int t = 0; t < granule_tokens; ++t) {
        if (position + t >= first && position + t <= last) continue;
        auto* value = reinterpret_cast<std::uint16_t*>(granule) + (t / 2 * head_dim) * 2 + t % 2;
        for (int d = 0; d < head_dim; ++d) value[2 * d] = 0;
    }
}

// Granule `g` of the part's values; zeros where the call sees none of it.
PENSTOCK_INLINE std::byte* values_of(const PartView& part, int head_dim, int g) {
    return part.values + std::int64_t{g} * granule_tokens * head_dim * 2;
}

template <class Kv>
PartView view_part(const AttentionTile& tile, int begin, int end, const TileMemory& memory) {
    PartView part{};
    const int first = tile.first[0], last = tile.last[tile.num_rows - 1];
    part.begin = begin;
    part.from = at_least(begin, first) / granule_tokens - begin / granule_tokens;
    part.to = (at_most(end, last + 1) - begin + granule_tokens - 1) / granule_tokens;
    part.values = memory.values;
    const int dims = tile.head_dim;
    for (int g = part.from; g < part.to; ++g) {
        const int granule = begin / granule_tokens + g, position = begin + g * granule_tokens;
        const std::int64_t offset = tile.block_table[granule / tile.granules_per_block] * tile.block_stride +
                                    granule % tile.granules_per_block * tile.granule_bytes;
        part.key_scales[g] = tile.keys + offset;
        part.value_scales[g] = tile.values + offset;
        // The keys come from memory while the values are copied.
        for (int line = 0; line < tile.granule_bytes; line += 64)
            __builtin_prefetch(tile.keys + offset + line, 0, 2);
        copy_granule<Kv>(tile.values + offset, dims, values_of(part, dims, g));
        if (position < first || position + granule_tokens - 1 > last) {
            clear_unseen(values_of(part, dims, g), dims, position, first, last);
        }
        part.keys[g] = ready_keys<Kv>(tile.keys + offset, dims,
                                      memory.keys + std::int64_t{g} * granule_tokens * padded_dims(dims) * 2);
    }
    // Tiles take granules in pairs.
    const std::size_t granule_bytes = static_cast<std::size_t>(granule_tokens * dims) * 2;
    if (part.from % 2 == 1) std::memset(values_of(part, dims, part.from - 1), 0, granule_bytes);
    if (part.to % 2 == 1) std::memset(values_of(part, dims, part.to), 0, granule_bytes);
    return part;
}

// ---- scores and weights

void score_group(const AttentionTile& tile, const PartView& part, const RowGroup& group,
                 RowScratch& scratch) {
    const std::int64_t stride = tile.head_dim * std::int64_t{sizeof(float)};  // of a packed query
    for (int g = group.from; g < group.to; g += 2) {
        const int other = g + 1 < group.to ? g + 1 : g;
        float* scores = scratch.scores[0];
        float* high = scratch.scores[tile_rows_max];
        multiply({.a = {tile.query + group.row[0] * stride, tile.query + group.row[1] * stride},
                  .a_stride = stride,
                  .b = {part.keys[g], part.keys[other]},
                  .b_stride = 64,
                  .b_step = tile_bytes,
                  .num_steps = padded_dims(tile.head_dim) / dims_of_step,
                  .c = {{scores + g * granule_tokens, scores + other * granule_tokens},
                        {high + g * granule_tokens, high + other * granule_tokens}},
                  .c_stride = score_stride * sizeof(float)},
                 group.tiles);
    }
}

PENSTOCK_INLINE F32 scales_at(const std::byte* granule, int head_dim) {
    return load(reinterpret_cast<const float*>(granule + granule_tokens * head_dim));
}

// Whether the row sees all tokens of the granule that begins at `position`.
PENSTOCK_INLINE bool sees_whole(const AttentionTile& tile, int row, int position) {
    return tile.first[row] <= position && tile.last[row] >= position + granule_tokens - 1;
}

PENSTOCK_INLINE F32 where_seen(const AttentionTile& tile, int row, int position, F32 v, F32 otherwise) {
    const I32 at = lane_indices() + position;
    v = at < tile.first[row] ? otherwise : v;
    return at > tile.last[row] ? otherwise : v;
}

// The row's scores of the granule, -inf where it sees no key: products, with the key's scale and soft-capped
// where asked for.
template <class Kv>
PENSTOCK_INLINE F32 score_of(const AttentionTile& tile, const PartView& part, int row, int g, float* scores) {
    F32 s = load(scores);
    if constexpr (Kv::is_scaled) s *= scales_at(part.key_scales[g], tile.head_dim);
    if (tile.softcap > 0.0f) s = tanh_of(s * (tile.scale / tile.softcap));
    const int position = part.begin + g * granule_tokens;
    const bool is_whole = sees_whole(tile, row, position);
    if (!is_whole) s = where_seen(tile, row, position, s, splat(minus_infinity));
    if (Kv::is_scaled || tile.softcap > 0.0f || !is_whole) store(scores, s);
    return s;
}

// One row's weights, their maximum and sum.
template <class Kv>
void weigh_row(const AttentionTile& tile, const PartView& part, const RowGroup& group, int row, float* scores,
               std::uint16_t* weights, const AttentionPart& to) {
    F32 largest = splat(minus_infinity);
    for (int g = group.from; g < group.to; ++g) {
        largest = larger(score_of<Kv>(tile, part, row, g, scores + g * granule_tokens), largest);
    }
    const float factor = (tile.softcap > 0.0f ? tile.softcap : tile.scale) * log2_e;
    const float max = largest_of(largest) * factor;
    const float base = max == minus_infinity ? 0.0f : max;
    F32 sum{};
    for (int g = group.from; g < group.to; ++g) {
        F32 w = exp2_of(load(scores + g * granule_tokens) * factor - base);
        sum += w;
        if constexpr (Kv::is_scaled) {
            const int position = part.begin + g * granule_tokens;
            w *= scales_at(part.value_scales[g], tile.head_dim);
            // An unseen slot's scale may be NaN.
            if (!sees_whole(tile, row, position)) w = where_seen(tile, row, position, w, F32{});
        }
        store(weights + g * granule_tokens, w);
    }
    if (group.from % 2 == 1) store(weights + (group.from - 1) * granule_tokens, F32{});
    if (group.to % 2 == 1) store(weights + group.to * granule_tokens, F32{});
    to.max[row] = max;
    to.sum[row] = sum_of(sum);
}

// ---- values

// `out`: where the tiles' rows go, [16][D] each.
void multiply_values(const AttentionTile& tile, const RowGroup& group, const std::byte* values,
                     const RowScratch& scratch, float* const (&out)[2]) {
    const int dims = tile.head_dim, first_step = group.from / 2, end_step = (group.to + 1) / 2;
    const std::int64_t pair_bytes = std::int64_t{dims} * 4, step_bytes = pair_bytes * tile_rows_max;
    const auto* weights =
        reinterpret_cast<const std::byte*>(scratch.weights[0] + first_step * tokens_of_step);
    const auto* high =
        reinterpret_cast<const std::byte*>(scratch.weights[tile_rows_max] + first_step * tokens_of_step);
    for (int d = 0; d < dims; d += 32) {
        const int at = at_most(d, dims - 32);  // the last pair of 16 dims begins earlier where they are an odd number
        const std::byte* b = values + first_step * step_bytes + at * 4;
        multiply({.a = {weights, high},
                  .a_stride = weight_stride * sizeof(std::uint16_t),
                  .b = {b, b + 64},
                  .b_stride = pair_bytes,
                  .b_step = step_bytes,
                  .num_steps = end_step - first_step,
                  .c = {{out[0] + at, out[0] + at + 16}, {out[1] + at, out[1] + at + 16}},
                  .c_stride = dims * std::int64_t{sizeof(float)}},
                 group.tiles);
    }
}

// Whether a value that some row of the group does not see, and another may, is inf or NaN: 0 times it would
// be NaN.
bool has_unseen_nan(const AttentionTile& tile, const PartView& part, const RowGroup& group) {
    const int last_row = group.row[group.tiles - 1] + group.num - 1;
    for (int g = group.from; g < group.to; ++g) {
        const int position = part.begin + g * granule_tokens;
        const bool is_whole =
            sees_whole(tile, group.row[0], position) && sees_whole(tile, last_row, position);
        if (!is_whole && !is_finite(values_of(part, tile.head_dim, g), tile.head_dim)) return true;
    }
    return false;
}

// Row by row, with zeros for what the row does not see: the same bits, many times slower, as rare as inf and
// NaN are.
void multiply_values_by_row(const AttentionTile& tile, const PartView& part, const RowGroup& group,
                            const TileMemory& memory, const AttentionPart& to) {
    const int dims = tile.head_dim;
    const std::int64_t granule_bytes = std::int64_t{granule_tokens} * dims * 2;
    for (int t = 0; t < group.tiles; ++t) {
        for (int i = 0; i < group.num; ++i) {
            const int row = group.row[t] + i;
            std::memcpy(memory.cleaned, memory.values,
                        static_cast<std::size_t>(part_granules * granule_bytes));
            for (int g = group.from; g < group.to; ++g) {
                clear_unseen(memory.cleaned + g * granule_bytes, dims, part.begin + g * granule_tokens,
                             tile.first[row], tile.last[row]);
            }
            const RowGroup one{1, {group.row[t], group.row[t]}, group.num, group.from, group.to};
            RowScratch& scratch = memory.rows;
            if (t == 1 && i == 0)
                std::memcpy(scratch.weights[0], scratch.weights[tile_rows_max], sizeof scratch.weights / 2);
            multiply_values(tile, one, memory.cleaned, scratch, {memory.out, memory.out});
            std::memcpy(to.out + row * dims, memory.out + i * dims,
                        static_cast<std::size_t>(dims) * sizeof(float));
        }
    }
}

// ---- the part

// Rows from `row` on: up to 32, the second tile moved up where fewer are left.
RowGroup group_at(const AttentionTile& tile, const PartView& part, int row) {
    const int left = tile.num_rows - row;
    RowGroup group{};
    group.num = at_most(tile.num_rows, tile_rows_max);
    group.tiles = left > tile_rows_max ? 2 : 1;
    group.row[0] = group.tiles == 2 ? row : at_least(0, at_most(row, tile.num_rows - tile_rows_max));
    group.row[1] =
        group.tiles == 2 ? at_most(row + tile_rows_max, tile.num_rows - tile_rows_max) : group.row[0];
    const int first = tile.first[group.row[0]] - part.begin;
    const int last = tile.last[group.row[group.tiles - 1] + group.num - 1] - part.begin;
    group.from = at_least(part.from, first > 0 ? first / granule_tokens : 0);
    group.to = last < 0 ? 0 : at_most(part.to, last / granule_tokens + 1);
    return group;
}

template <class Kv>
void attend_rows(const AttentionTile& tile, const PartView& part, const RowGroup& group,
                 const TileMemory& memory, const AttentionPart& to) {
    RowScratch& scratch = memory.rows;
    score_group(tile, part, group, scratch);
    for (int t = 0; t < group.tiles; ++t) {
        for (int i = 0; i < group.num; ++i) {
            const int local = t * tile_rows_max + i;
            weigh_row<Kv>(tile, part, group, group.row[t] + i, scratch.scores[local], scratch.weights[local],
                          to);
        }
    }
    if (!Kv::is_scaled && has_unseen_nan(tile, part, group)) {
        multiply_values_by_row(tile, part, group, memory, to);
        return;
    }
    float* const out[2] = {to.out + group.row[0] * tile.head_dim, to.out + group.row[1] * tile.head_dim};
    multiply_values(tile, group, part.values, scratch, out);
}

// Rows that see nothing of the part.
void see_nothing(const RowGroup& group, int head_dim, const AttentionPart& to) {
    for (int i = 0; i < group.tiles * tile_rows_max; ++i) {
        if (i % tile_rows_max >= group.num) continue;
        const int row = group.row_at(i);
        to.max[row] = minus_infinity;
        to.sum[row] = 0.0f;
        std::memset(to.out + row * head_dim, 0, static_cast<std::size_t>(head_dim) * sizeof(float));
    }
}

template <class Kv>
void attend_with_tiles(const AttentionTile& tile, int begin, int end, const AttentionPart& to) {
    const TileMemory memory(tile.scratch, tile.head_dim);
    tile::configure_product(tile.num_rows);
    const PartView part = view_part<Kv>(tile, begin, end, memory);
    for (int row = 0; row < tile.num_rows; row += group_rows) {
        const RowGroup group = group_at(tile, part, row);
        if (group.from < group.to) {
            attend_rows<Kv>(tile, part, group, memory, to);
        } else {
            see_nothing(group, tile.head_dim, to);
        }
    }
}

// A row of the packed query is head_dim bf16 and as many zeros: tiles read whole 32 dims.
void pack_tile_query(const std::uint16_t* from, int head_dim, std::byte* to) {
    const std::size_t bytes = static_cast<std::size_t>(head_dim) * sizeof(std::uint16_t);
    std::memcpy(to, from, bytes);
    std::memset(to + bytes, 0, bytes);
}

constexpr AttentionKernels with_tiles() {
    AttentionKernels table = kernels;
    table.query_item_bytes = sizeof(float);
    table.pack_query = pack_tile_query;
    table.attend[static_cast<int>(KvFormat::bf16)] = attend_with_tiles<Bf16Kv>;
    table.attend[static_cast<int>(KvFormat::int8)] = attend_with_tiles<Int8Kv>;
    return table;
}

constexpr AttentionKernels tile_kernels = with_tiles();

}  // namespace
}  // namespace penstock
