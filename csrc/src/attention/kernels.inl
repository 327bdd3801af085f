// Attention over one part of the keys, rotation and cache writes: the source that each instruction set
// compiles.
//
// Not here: which tile, which part, which thread (attention_op.cpp).
//
// A part is walked in steps of 64 keys (4 granules), and in a step the tile's rows in groups that fill the
// registers:
//
// ```
// scores [rows][64]  = query pairs (broadcast) x keys [pairs][16 tokens][2]         sums over the dims in order
// weights [rows][64] = 2^(scores - max so far); where max rises, sum and out shrink by 2^(old - new)
// out [rows][D]     += weight pairs (broadcast) x values [8 pairs][D][2]            sums over the tokens in order
// ```
//
// A row's numbers are one sequence of operations fixed by the positions of its keys: rows and keys that
// another row makes the group visit get the weight 0 here, which adds 0 and multiplies by 1.
//
// AVX-512 multiplies bf16 pairs (the weights are rounded to bf16: relative 2^-9); the others widen to
// float32.
//
// Source: Dao et al., FlashAttention, 2022, algorithm 1; Milakov and Gimelshein, Online normalizer
// calculation for softmax, 2018.
#include <limits>
#include <utility>

// GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for a mistake (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include "penstock/attention.h"
#include "penstock/bf16.h"
#include "penstock/simd.h"

namespace penstock {
namespace {

PENSTOCK_INLINE constexpr int at_least(int a, int b) { return a > b ? a : b; }
PENSTOCK_INLINE constexpr int at_most(int a, int b) { return a < b ? a : b; }

constexpr int step_granules = 4;
constexpr int step_tokens = step_granules * granule_tokens;
constexpr int step_pairs = step_tokens / 2;
constexpr int granule_vectors = granule_tokens / lanes;
constexpr float log2_e = 1.44269504f;
constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

static_assert(part_tokens % step_tokens == 0, "a step lies in one part");

#if defined(__AVX512BF16__)

// Rows times vectors of sums, the vectors of pairs and a weight fit into 32 registers; 12 sums hide a dot's
// latency. Six rows are fastest a row, but seven or eight (one token's heads) are faster at once than in two
// groups.
constexpr int max_rows = 8, best_rows = 6;
constexpr int vectors_of(int rows) { return rows <= 6 ? 4 : 2; }

using Weight = std::uint32_t;  // a pair of bf16
using Pairs = __m512bh;

PENSTOCK_INLINE F32 dot(F32 sum, Pairs x, Weight w) {
    return (F32)_mm512_dpbf16_ps((__m512)sum, x, (__m512bh)_mm512_set1_epi32(static_cast<int>(w)));
}

PENSTOCK_INLINE Pairs load_bf16_pairs(const std::byte* from) { return (__m512bh)_mm512_loadu_si512(from); }

// int8 -> bf16 is exact.
PENSTOCK_INLINE Pairs load_int8_pairs(const std::byte* from) {
    const auto* bytes = reinterpret_cast<const __m128i*>(from);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes + 1)));
    return _mm512_cvtne2ps_pbh(high, low);
}

PENSTOCK_INLINE void store_weights(Weight* to, F32 v) {
    const U16 half = narrow(v);
    std::memcpy(to, &half, sizeof half);
}

PENSTOCK_INLINE void pack_weights(const std::uint16_t* from, int num, Weight* to) {
    std::memcpy(to, from, static_cast<std::size_t>(num) * sizeof(std::uint16_t));
}

#else

#if defined(__AVX2__)
constexpr int max_rows = 4, best_rows = 4;  // 8 sums, four halves of pairs, a weight: of 16 registers
constexpr int vectors_of(int) { return 2; }
#else
constexpr int max_rows = 2, best_rows = 2;
constexpr int vectors_of(int) { return 4; }
#endif

struct Weight {
    float even, odd;
};
struct Pairs {
    F32 even, odd;
};

PENSTOCK_INLINE F32 dot(F32 sum, const Pairs& x, Weight w) { return (sum + x.even * w.even) + x.odd * w.odd; }

PENSTOCK_INLINE Pairs load_bf16_pairs(const std::byte* from) {
    U32 bits;
    std::memcpy(&bits, from, sizeof bits);
    return {(F32)(bits << 16), (F32)(bits & 0xffff0000u)};
}

PENSTOCK_INLINE Pairs load_int8_pairs(const std::byte* from) {
    U16 bytes;
    std::memcpy(&bytes, from, sizeof bytes);
#if defined(__AVX2__)
    const I32 both = (I32)_mm256_cvtepu16_epi32((__m128i)bytes);
#else
    const I32 both = (I32)__builtin_convertvector(bytes, U32);
#endif
    return {__builtin_convertvector((both << 24) >> 24, F32),
            __builtin_convertvector((both << 16) >> 24, F32)};
}

PENSTOCK_INLINE void store_weights(Weight* to, F32 v) { std::memcpy(to, &v, sizeof v); }

PENSTOCK_INLINE void pack_weights(const std::uint16_t* from, int num, Weight* to) {
    for (int i = 0; i < num / 2; ++i) to[i] = {to_float(from[2 * i]), to_float(from[2 * i + 1])};
}

#endif

struct Bf16Kv {
    static constexpr bool is_scaled = false;
    static constexpr int pair_bytes = 4;
    PENSTOCK_INLINE static Pairs load_pairs(const std::byte* from) { return load_bf16_pairs(from); }
};

struct Int8Kv {
    static constexpr bool is_scaled = true;
    static constexpr int pair_bytes = 2;
    PENSTOCK_INLINE static Pairs load_pairs(const std::byte* from) { return load_int8_pairs(from); }
};

// 2^f on [-1/2, 1/2]: minimax of degree 5, relative error 1e-7; 1 at 0.
PENSTOCK_INLINE F32 exp2_fraction(F32 f) {
    F32 p = splat(1.326472731307149e-3f);
    p = p * f + 9.671512991189957e-3f;
    p = p * f + 5.550733581185341e-2f;
    p = p * f + 2.4022242426872253e-1f;
    p = p * f + 6.931470036506653e-1f;
    return p * f + 1.0f;
}

// 2^v for v <= 127 with the relative error of its fraction, and 0 for v far below -126; NaN gives NaN.
PENSTOCK_INLINE F32 exp2_of(F32 v) {
#if defined(__AVX512F__)
    const __m512 x = _mm512_max_ps(_mm512_set1_ps(-1000.0f), (__m512)v);  // not -inf: inf - inf is NaN
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (F32)_mm512_scalef_ps((__m512)exp2_fraction((F32)_mm512_sub_ps(x, n)), n);
#else
    constexpr float lowest = -127.0f;  // its power of two has the bits of 0
    const F32 x = v < lowest ? splat(lowest) : v;
    const F32 shifted = x + round_magic;
    return exp2_fraction(x - (shifted - round_magic)) * (F32)(((I32)shifted - 0x4b400000 + 127) << 23);
#endif
}

PENSTOCK_INLINE F32 larger_of(F32 a, F32 b) {
#if defined(__AVX512F__)
    return (F32)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (F32)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return larger(a, b);
#endif
}

PENSTOCK_INLINE float largest_lane(F32 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    return largest_of(v);
#endif
}

// In a register: a vector that is loaded where its lanes were just stored one by one waits for all of them.
template <int Lane>
PENSTOCK_INLINE void set_lane(F32& v, float value) {
#if defined(__AVX512F__)
    v = (F32)_mm512_mask_broadcastss_ps((__m512)v, 1u << Lane, _mm_set_ss(value));
#else
    v[Lane] = value;
#endif
}

// f(0), f(1), ... f(N - 1) with constants, so that arrays indexed by them live in registers.
template <int N, class F>
PENSTOCK_INLINE void repeat(F&& f) {
    [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
        (f(std::integral_constant<int, i>{}), ...);
    }(std::make_integer_sequence<int, N>{});
}

#define PENSTOCK_INLINE_LAMBDA __attribute__((always_inline))

// Where a step's granules lie, and which part of it the group of rows reads.
struct StepView {
    const std::byte* keys[step_granules];
    const std::byte* values[step_granules];
    // The granules at the same places of the next step: whoever reads a line here asks for the same line
    // there. One at a time, because a core keeps few lines on their way at once, and a burst would wait for
    // itself; with no count of its own, because that took a third of the time. Where there is nothing to ask
    // for, the granule itself.
    const std::byte* next_keys[step_granules];
    const std::byte* next_values[step_granules];
    int begin;  // position of granule 0's first token
    int from;   // granules [from, to)
    int to;
};

PENSTOCK_INLINE void fetch(const std::byte* next) { __builtin_prefetch(next); }

// One thread's memory for a group of rows.
struct GroupScratch {
    alignas(64) float scores[max_rows][step_tokens];
    alignas(64) Weight weights[max_rows][step_pairs];
    alignas(64) float sums[max_tile_rows][lanes];
    alignas(64) std::byte clean[64];    // and on: the granules of a step, without what a row may not see
};

// ---- scores

// Scores of R rows with the keys of G granules; each sums its dims in their order.
template <class Kv, int R, int G>
void multiply_keys(const std::byte* const* keys, const std::byte* const* next, const Weight* query,
                   int num_pairs, float* scores) {
    constexpr int num_vectors = G * granule_vectors;
    F32 sums[R][num_vectors]{};
    for (int p = 0; p < num_pairs; ++p) {
        Pairs x[num_vectors];
        repeat<num_vectors>([&](auto v) PENSTOCK_INLINE_LAMBDA {
            constexpr int token = v % granule_vectors * lanes;
            const int at = (p * granule_tokens + token) * Kv::pair_bytes;
            x[v] = Kv::load_pairs(keys[v / granule_vectors] + at);
            if (at % cache_line == 0) fetch(next[v / granule_vectors] + at);
        });
        repeat<R>([&](auto r) PENSTOCK_INLINE_LAMBDA {
            const Weight w = query[r * num_pairs + p];
            repeat<num_vectors>([&](auto v)
                                    PENSTOCK_INLINE_LAMBDA { sums[r][v] = dot(sums[r][v], x[v], w); });
        });
    }
    repeat<R>([&](auto r) PENSTOCK_INLINE_LAMBDA {
        repeat<num_vectors>([&](auto v) PENSTOCK_INLINE_LAMBDA {
            store(scores + r * step_tokens + v * lanes, sums[r][v]);
        });
    });
    if constexpr (Kv::is_scaled) {
        for (int g = 0; g < G; ++g) fetch(next[g] + num_pairs * granule_tokens * Kv::pair_bytes);
    }
}

template <class Kv, int R>
void score_step(const StepView& step, const Weight* query, int num_pairs, float* scores) {
    constexpr int most = at_least(1, vectors_of(R) / granule_vectors);
    int g = step.from;
    while (g < step.to) {
        const std::byte* const* keys = step.keys + g;
        const std::byte* const* next = step.next_keys + g;
        float* to = scores + g * granule_tokens;
        const int num = step.to - g < most ? step.to - g : most;
        if constexpr (most >= 4) {
            if (num == 4) multiply_keys<Kv, R, 4>(keys, next, query, num_pairs, to);
            if (num == 3) multiply_keys<Kv, R, 3>(keys, next, query, num_pairs, to);
        }
        if constexpr (most >= 2) {
            if (num == 2) multiply_keys<Kv, R, 2>(keys, next, query, num_pairs, to);
        }
        if (num == 1) multiply_keys<Kv, R, 1>(keys, next, query, num_pairs, to);
        g += num;
    }
}

// ---- softmax

PENSTOCK_INLINE I32 lane_indices() {
    I32 v;
    for (int i = 0; i < lanes; ++i) v[i] = i;
    return v;
}

PENSTOCK_INLINE F32 scales_of(const std::byte* granule, const AttentionTile& tile, int token) {
    return load(reinterpret_cast<const float*>(granule + granule_tokens * tile.head_dim) + token);
}

// f(v) for the step's vectors of keys; IsWhole: all of them, unrolled.
template <bool IsWhole, class F>
PENSTOCK_INLINE void for_each_vector(const StepView& step, F&& f) {
    if constexpr (IsWhole) {
        repeat<step_granules * granule_vectors>(f);
    } else {
        for (int v = step.from * granule_vectors; v < step.to * granule_vectors; ++v) f(v);
    }
}

PENSTOCK_INLINE F32 only_seen(F32 v, F32 otherwise, const AttentionTile& tile, int row, int position) {
    const I32 at = lane_indices() + position;
    v = at < tile.first[row] ? otherwise : v;
    return at > tile.last[row] ? otherwise : v;
}

// A score is a factor times what lies in `scores` after this, and -inf there where the row does not see the
// key. Returns the largest. IsPlain: all granules, all keys seen, no cap.
template <class Kv, bool IsPlain>
PENSTOCK_INLINE float finish_scores(const AttentionTile& tile, const StepView& step, int row, float* scores) {
    const float inner = tile.scale / tile.softcap;
    F32 largest = splat(minus_infinity);
    for_each_vector<IsPlain>(step, [&](auto v) PENSTOCK_INLINE_LAMBDA {
        F32 s = load(scores + v * lanes);
        if constexpr (Kv::is_scaled) {
            s *= scales_of(step.keys[v / granule_vectors], tile, v % granule_vectors * lanes);
        }
        if constexpr (!IsPlain) {
            if (tile.softcap > 0.0f) s = tanh_of(s * inner);
            s = only_seen(s, splat(minus_infinity), tile, row, step.begin + v * lanes);
        }
        if constexpr (Kv::is_scaled || !IsPlain) store(scores + v * lanes, s);
        largest = larger_of(s, largest);
    });
    return largest_lane(largest);
}

// 2^(score - base), added to the row's sums and stored as weights of the values.
template <class Kv, bool IsPlain>
PENSTOCK_INLINE void store_row(const AttentionTile& tile, const StepView& step, int row, const float* scores,
                               float factor, float base, Weight* weights, F32& sum) {
    for_each_vector<IsPlain>(step, [&](auto v) PENSTOCK_INLINE_LAMBDA {
        F32 w = exp2_of(load(scores + v * lanes) * factor - base);
        sum += w;
        if constexpr (Kv::is_scaled) {
            w *= scales_of(step.values[v / granule_vectors], tile, v % granule_vectors * lanes);
            // An unseen slot's scale may be NaN.
            if constexpr (!IsPlain) w = only_seen(w, F32{}, tile, row, step.begin + v * lanes);
        }
        store_weights(weights + v * lanes / 2, w);
    });
}

// The weights of R rows, and in `shrink` what their sums and outs so far are multiplied by.
template <class Kv, int R, bool IsPlain>
void weigh(const AttentionTile& tile, const StepView& step, int row, float* max, GroupScratch& scratch,
           float* shrink) {
    static_assert(R <= lanes);
    const float factor = (tile.softcap > 0.0f ? tile.softcap : tile.scale) * log2_e;
    alignas(64) float base[lanes];
    F32 largest{};
    repeat<R>([&](auto r) PENSTOCK_INLINE_LAMBDA {
        set_lane<r>(largest, finish_scores<Kv, IsPlain>(tile, step, row + r, scratch.scores[r]));
    });
    const F32 old = load_first(max + row, R);
    const F32 now = larger_of(largest * factor, old);
    const F32 bases = now == minus_infinity ? F32{} : now;
    store(base, bases);
    store(shrink, exp2_of(old - bases));
    store_first(max + row, now, R);
    repeat<R>([&](auto r) PENSTOCK_INLINE_LAMBDA {
        F32 sum = load(scratch.sums[row + r]) * shrink[r];
        store_row<Kv, IsPlain>(tile, step, row + r, scratch.scores[r], factor, base[r], scratch.weights[r],
                               sum);
        store(scratch.sums[row + r], sum);
    });
}

// ---- values

// C vectors of out, of R rows, from `column` on; each sums its tokens in their order.
template <class Kv, int R, int C>
void multiply_values(const StepView& step, const Weight* weights, const float* shrink, int head_dim,
                     int column, float* out) {
    F32 sums[R][C];
    repeat<R>([&](auto r) PENSTOCK_INLINE_LAMBDA {
        repeat<C>([&](auto c) PENSTOCK_INLINE_LAMBDA {
            sums[r][c] = load(out + r * head_dim + column + c * lanes) * shrink[r];
        });
    });
    for (int g = step.from; g < step.to; ++g) {
        const std::byte* from = step.values[g] + column * Kv::pair_bytes;
        const std::byte* next = step.next_values[g] + column * Kv::pair_bytes;
        if (Kv::is_scaled && column == 0) fetch(step.next_values[g] + granule_tokens * head_dim);
        const Weight* weight = weights + g * (granule_tokens / 2);
        const int row_bytes = head_dim * Kv::pair_bytes;
        for (int t = 0; t < granule_tokens / 2; ++t, ++weight, from += row_bytes, next += row_bytes) {
            Pairs x[C];
            repeat<C>([&](auto c) PENSTOCK_INLINE_LAMBDA {
                constexpr int at = c * lanes * Kv::pair_bytes;
                x[c] = Kv::load_pairs(from + at);
                if constexpr (at % cache_line == 0) fetch(next + at);
            });
            repeat<R>([&](auto r) PENSTOCK_INLINE_LAMBDA {
                const Weight w = weight[r * step_pairs];
                repeat<C>([&](auto c) PENSTOCK_INLINE_LAMBDA { sums[r][c] = dot(sums[r][c], x[c], w); });
            });
        }
    }
    repeat<R>([&](auto r) PENSTOCK_INLINE_LAMBDA {
        repeat<C>([&](auto c)
                      PENSTOCK_INLINE_LAMBDA { store(out + r * head_dim + column + c * lanes, sums[r][c]); });
    });
}

template <class Kv, int R>
void value_step(const StepView& step, const Weight* weights, const float* shrink, int head_dim, float* out) {
    constexpr int most = vectors_of(R);
    const int num = head_dim / lanes;
    int c = 0;
    while (c < num) {
        const int left = num - c;
        // The last six or five as three and the rest: two narrow groups are slower than two even ones.
        int width = at_most(left, most);
        if (most == 4 && (left == 5 || left == 6)) width = 3;
        const int column = c * lanes;
        if constexpr (most == 4) {
            if (width == 4) multiply_values<Kv, R, 4>(step, weights, shrink, head_dim, column, out);
            if (width == 3) multiply_values<Kv, R, 3>(step, weights, shrink, head_dim, column, out);
        }
        if (width == 2) multiply_values<Kv, R, 2>(step, weights, shrink, head_dim, column, out);
        if (width == 1) multiply_values<Kv, R, 1>(step, weights, shrink, head_dim, column, out);
        c += width;
    }
}

// True when no exponent among the granule's values is that of inf and NaN.
bool is_finite(const std::byte* granule, int head_dim) {
    I32 worst{};
    for (int i = 0; i < granule_tokens * head_dim * 2; i += lanes * 4) {
        U32 bits;
        std::memcpy(&bits, granule + i, sizeof bits);
        worst |= (I32)((bits & 0x7f800000u) == 0x7f800000u) | (I32)((bits & 0x7f80u) == 0x7f80u);
    }
    for (int i = 0; i < lanes; ++i) {
        if (worst[i]) return false;
    }
    return true;
}

// Whether 0 times an unseen value might be NaN: only granules that some row of [row, row + num) does not see
// whole count.
bool needs_cleaning(const AttentionTile& tile, const StepView& step, int row, int num) {
    for (int g = step.from; g < step.to; ++g) {
        const int begin = step.begin + g * granule_tokens;
        const bool is_whole =
            tile.first[row + num - 1] <= begin && tile.last[row] >= begin + granule_tokens - 1;
        if (!is_whole && !is_finite(step.values[g], tile.head_dim)) return true;
    }
    return false;
}

// The step's values with zeros in the slots that the row does not see.
StepView clean_step(const AttentionTile& tile, const StepView& step, int row, std::byte* clean) {
    StepView view = step;
    for (int g = step.from; g < step.to; ++g) {
        std::byte* copy = clean + g * tile.granule_bytes;
        std::memcpy(copy, step.values[g], static_cast<std::size_t>(tile.granule_bytes));
        for (int t = 0; t < granule_tokens; ++t) {
            const int position = step.begin + g * granule_tokens + t;
            if (position >= tile.first[row] && position <= tile.last[row]) continue;
            auto* value = reinterpret_cast<std::uint16_t*>(copy) + (t / 2 * tile.head_dim) * 2 + t % 2;
            for (int d = 0; d < tile.head_dim; ++d) value[2 * d] = 0;
        }
        view.values[g] = copy;
    }
    return view;
}

// ---- a group of rows

template <class Kv, int R>
void attend_group(const AttentionTile& tile, const StepView& step, int row, const AttentionPart& part,
                  GroupScratch& scratch) {
    const int num_pairs = tile.head_dim / 2;
    const auto* query = reinterpret_cast<const Weight*>(tile.query) + row * num_pairs;
    float* out = part.out + row * tile.head_dim;
    alignas(64) float shrink[lanes];
    score_step<Kv, R>(step, query, num_pairs, scratch.scores[0]);
    const bool is_edge = tile.first[row + R - 1] > step.begin + step.from * granule_tokens ||
                         tile.last[row] < step.begin + step.to * granule_tokens - 1;
    const bool is_plain = !is_edge && step.to - step.from == step_granules && !(tile.softcap > 0.0f);
    const auto weigh_rows = is_plain ? weigh<Kv, R, true> : weigh<Kv, R, false>;
    weigh_rows(tile, step, row, part.max, scratch, shrink);
    if (!Kv::is_scaled && is_edge && needs_cleaning(tile, step, row, R)) {
        for (int r = 0; r < R; ++r) {
            const StepView clean = clean_step(tile, step, row + r, scratch.clean);
            value_step<Kv, 1>(clean, scratch.weights[r], shrink + r, tile.head_dim, out + r * tile.head_dim);
        }
        return;
    }
    value_step<Kv, R>(step, scratch.weights[0], shrink, tile.head_dim, out);
}

using AttendGroup = void (*)(const AttentionTile&, const StepView&, int, const AttentionPart&, GroupScratch&);

// By the number of rows.
template <class Kv>
AttendGroup group_kernel(int num_rows) {
    static constexpr AttendGroup kernels[] = {
        nullptr,
        attend_group<Kv, 1>,
        attend_group<Kv, 2>,
#if PENSTOCK_LANES >= 8
        attend_group<Kv, 3>,
        attend_group<Kv, 4>,
#endif
#if PENSTOCK_LANES >= 16
        attend_group<Kv, 5>,
        attend_group<Kv, 6>,
        attend_group<Kv, 7>,
        attend_group<Kv, 8>,
#endif
    };
    static_assert(sizeof kernels / sizeof kernels[0] == max_rows + 1);
    return kernels[num_rows];
}

// The addresses of granules [from, to) of the step that begins at position `begin`.
StepView view_step(const AttentionTile& tile, int begin, int end, int seen_from, int seen_to) {
    StepView step{};
    step.begin = begin;
    step.from = at_least(begin, seen_from) / granule_tokens - begin / granule_tokens;
    step.to =
        (at_most(at_most(begin + step_tokens, end), seen_to) - begin + granule_tokens - 1) / granule_tokens;
    for (int g = step.from; g < step.to; ++g) {
        const int granule = begin / granule_tokens + g;
        const std::int64_t offset = tile.block_table[granule / tile.granules_per_block] * tile.block_stride +
                                    granule % tile.granules_per_block * tile.granule_bytes;
        step.keys[g] = tile.keys + offset;
        step.values[g] = tile.values + offset;
    }
    return step;
}

int num_groups_of(int num_rows) { return num_rows <= max_rows ? 1 : (num_rows + best_rows - 1) / best_rows; }

// The step's lines ask for those of `next`, or for none.
void aim(StepView& step, const StepView* next) {
    for (int g = step.from; g < step.to; ++g) {
        const bool is_there = next && g >= next->from && g < next->to;
        step.next_keys[g] = is_there ? next->keys[g] : step.keys[g];
        step.next_values[g] = is_there ? next->values[g] : step.values[g];
    }
}

// All groups of rows over one step; a group reads only the granules that one of its rows sees.
template <class Kv>
void attend_step(const AttentionTile& tile, const StepView& step, const AttentionPart& part,
                 GroupScratch& scratch) {
    const int num_groups = num_groups_of(tile.num_rows);
    for (int i = 0; i < num_groups; ++i) {
        const int row = tile.num_rows * i / num_groups, end = tile.num_rows * (i + 1) / num_groups;
        StepView seen = step;
        if (i > 0) aim(seen, nullptr);  // the first group has asked
        const int first = tile.first[row] - step.begin, last = tile.last[end - 1] - step.begin;
        seen.from = at_least(step.from, first > 0 ? first / granule_tokens : 0);
        seen.to = last < 0 ? 0 : at_most(step.to, last / granule_tokens + 1);
        if (seen.from < seen.to) group_kernel<Kv>(end - row)(tile, seen, row, part, scratch);
    }
}

template <class Kv>
void attend(const AttentionTile& tile, int begin, int end, const AttentionPart& part) {
    auto& scratch = *reinterpret_cast<GroupScratch*>(tile.scratch);
    std::memset(scratch.sums, 0, sizeof scratch.sums[0] * static_cast<std::size_t>(tile.num_rows));
    std::memset(part.out, 0, sizeof(float) * static_cast<std::size_t>(tile.num_rows * tile.head_dim));
    for (int r = 0; r < tile.num_rows; ++r) part.max[r] = minus_infinity;
    const int seen_from = tile.first[0], seen_to = tile.last[tile.num_rows - 1] + 1;
    StepView step = view_step(tile, begin, end, seen_from, seen_to);
    for (int at = begin; at < end; at += step_tokens) {
        StepView next{};
        const bool is_last = at + step_tokens >= end;
        if (!is_last || end < tile.fetch_end) {
            next = view_step(tile, at + step_tokens, is_last ? tile.fetch_end : end, seen_from, seen_to);
        }
        aim(step, &next);
        if (step.from < step.to) attend_step<Kv>(tile, step, part, scratch);
        step = next;
    }
    for (int r = 0; r < tile.num_rows; ++r) part.sum[r] = sum_of(load(scratch.sums[r]));
}

// ---- parts

void fold(int num_rows, int head_dim, const AttentionPart& total, const AttentionPart& part) {
    for (int r = 0; r < num_rows; ++r) {
        const float now = part.max[r] > total.max[r] ? part.max[r] : total.max[r];
        const float base = now == minus_infinity ? 0.0f : now;
        const float a = exp2_of(splat(total.max[r] - base))[0], b = exp2_of(splat(part.max[r] - base))[0];
        total.max[r] = now;
        total.sum[r] = total.sum[r] * a + part.sum[r] * b;
        float* to = total.out + r * head_dim;
        const float* from = part.out + r * head_dim;
        for (int d = 0; d < head_dim; d += lanes) store(to + d, load(to + d) * a + load(from + d) * b);
    }
}

// Adding 0 makes -0 to 0: whether a zero is negative may depend on the granules that were skipped.
void finish(const float* out, float sum, int head_dim, std::uint16_t* to) {
    const float inverse = 1.0f / sum;
    for (int d = 0; d < head_dim; d += lanes) store(to + d, load(out + d) * inverse + 0.0f);
}

void pack_query(const std::uint16_t* from, int head_dim, std::byte* to) {
    pack_weights(from, head_dim, reinterpret_cast<Weight*>(to));
}

// ---- rotation and writes

// (a, b) -> (a cos - b sin, b cos + a sin), a = dim i, b = dim i + half.
void rotate(const std::uint16_t* from, const float* angles, int num_heads, int head_dim, int half,
            std::uint16_t* to) {
    const int whole = half / lanes * lanes;
    for (int h = 0; h < num_heads; ++h, from += head_dim, to += head_dim) {
        for (int i = 0; i < whole; i += lanes) {
            const F32 cos = load(angles + i), sin = load(angles + half + i);
            const F32 a = load(from + i), b = load(from + half + i);
            store(to + i, a * cos - b * sin);
            store(to + half + i, b * cos + a * sin);
        }
        if (const int rest = half - whole; rest > 0) {
            const F32 cos = load_first(angles + whole, rest), sin = load_first(angles + half + whole, rest);
            const F32 a = load_first(from + whole, rest), b = load_first(from + half + whole, rest);
            store_first(to + whole, a * cos - b * sin, rest);
            store_first(to + half + whole, b * cos + a * sin, rest);
        }
        if (from != to && head_dim > 2 * half) {
            std::memcpy(to + 2 * half, from + 2 * half, static_cast<std::size_t>(head_dim - 2 * half) * 2);
        }
    }
}

void write_key_bf16(const std::uint16_t* from, int head_dim, int token, std::byte* granule) {
    auto* to = reinterpret_cast<std::uint32_t*>(granule) + token;
    for (int p = 0; p < head_dim / 2; ++p) {
        std::uint32_t pair;
        std::memcpy(&pair, from + 2 * p, sizeof pair);
        to[p * granule_tokens] = pair;
    }
}

void write_value_bf16(const std::uint16_t* from, int head_dim, int token, std::byte* granule) {
    auto* to = reinterpret_cast<std::uint16_t*>(granule) + token / 2 * head_dim * 2 + token % 2;
    for (int d = 0; d < head_dim; ++d) to[2 * d] = from[d];
}

// To int8 values; returns the scale. What is not finite makes the scale not finite.
float quantize_head(const std::uint16_t* from, int head_dim, std::int8_t* values) {
    F32 largest{};
    F32 doubt{};  // stays 0 while all is finite
    for (int d = 0; d < head_dim; d += lanes) {
        const F32 x = load(from + d);
        largest = larger(magnitude(x), largest);
        doubt += x * 0.0f;
    }
    const float peak = largest_of(largest);
    const float inverse = peak > 0.0f ? 127.0f / peak : 0.0f;
    for (int d = 0; d < head_dim; d += lanes) {
        const I32 q = round_to_int(load(from + d) * inverse);
        for (int i = 0; i < lanes; ++i) values[d + i] = static_cast<std::int8_t>(q[i]);
    }
    return peak / 127.0f + sum_of(doubt);
}

void write_scale(float scale, int head_dim, int token, std::byte* granule) {
    reinterpret_cast<float*>(granule + granule_tokens * head_dim)[token] = scale;
}

void write_key_int8(const std::uint16_t* from, int head_dim, int token, std::byte* granule) {
    std::int8_t values[256];
    write_scale(quantize_head(from, head_dim, values), head_dim, token, granule);
    auto* to = reinterpret_cast<std::int8_t*>(granule) + 2 * token;
    for (int d = 0; d < head_dim; ++d) to[d / 2 * 2 * granule_tokens + d % 2] = values[d];
}

void write_value_int8(const std::uint16_t* from, int head_dim, int token, std::byte* granule) {
    std::int8_t values[256];
    write_scale(quantize_head(from, head_dim, values), head_dim, token, granule);
    auto* to = reinterpret_cast<std::int8_t*>(granule) + token / 2 * head_dim * 2 + token % 2;
    for (int d = 0; d < head_dim; ++d) to[2 * d] = values[d];
}

constexpr AttentionKernels kernels{
    .query_item_bytes = sizeof(Weight) / 2,
    .pack_query = pack_query,
    .attend = {attend<Bf16Kv>, attend<Int8Kv>},
    .fold = fold,
    .finish = finish,
    .rotate = rotate,
    .write_key = {write_key_bf16, write_key_int8},
    .write_value = {write_value_bf16, write_value_int8},
};

}  // namespace
}  // namespace penstock
