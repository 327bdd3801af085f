// Rotation of positions, the paged KV cache's layout, and attention over it.
//
// Not here: which block belongs to whom (the engine), projections (linear). A block's bytes are arranged here
// alone; the engine only zeroes and copies whole blocks.
//
// A block holds `block_size` tokens (a multiple of 16) of every KV head. The unit is a granule: 16 tokens of
// one head.
//
// ```
// block of keys     [head][block_size / 16] granules of keys       (of values: the same with granules of values)
//
// bf16  keys        [D / 2 pairs of dims][16 tokens][2 dims]       64 bytes a pair: a vector, or a row of an AMX tile
//       values      [8 pairs of tokens][D dims][2 tokens]          D / 16 vectors a pair
// int8  keys        the same order in bytes, then [16 tokens] float32 scales
//       values      the same order in bytes, then [16 tokens] float32 scales
// ```
//
// With the pairs innermost both products are "vector of pairs times a broadcast pair": no sum across a
// vector. int8: one scale a token and head, scale = max|x| / 127, q = round(x / scale) to nearest even. A
// head of zeros has scale 0; a head that is not finite has a scale that is not, so that its readers see NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

#include "penstock/isa.h"
#include "penstock/program.h"

namespace penstock {

inline constexpr int granule_tokens = 16;

enum class KvFormat : int { bf16, int8 };

// Throws std::invalid_argument naming the value.
KvFormat kv_format_named(std::string_view name);

// How one layer's keys (and likewise its values) lie inside a block.
struct KvShape {
    KvFormat format;
    int block_size;
    int num_kv_heads;
    int head_dim;

    int granules_per_block() const;
    std::int64_t granule_bytes() const;
    std::int64_t head_bytes() const;   // from one head of a block to the next
    std::int64_t block_bytes() const;  // of the keys, and again of the values

    // Throws std::invalid_argument: block_size a multiple of 16, head_dim of 16 in 32..256, at least one
    // head.
    void check() const;
};

// Where a thread's queries of one KV head meet their keys. Some tokens of one sequence, and of each the query
// heads that read this KV head: row r of the tile is token r / heads, head r % heads.
struct AttentionTile {
    const std::byte* keys;  // block 0 of the layer, at this head
    const std::byte* values;
    std::int64_t block_stride;  // bytes from block to block
    const std::int32_t* block_table;
    int granules_per_block;
    std::int64_t granule_bytes;
    int head_dim;
    int num_rows;               // 1..max_tile_rows
    const std::int32_t* first;  // [num_rows]: row r sees the positions first[r] .. last[r]; both rise with r
    const std::int32_t* last;
    const std::byte* query;     // [num_rows], as pack_query left them
    float scale;                // above 0
    float softcap;              // 0 for none
    int fetch_end;              // keys up to this position are asked for next: worth fetching ahead
    std::byte* scratch;         // attend_scratch_bytes(head_dim), 64-byte aligned
};

// Softmax in parts. Over the keys of one part, with score = scale * log2(e) * q.k (soft-capped before
// log2(e)):
//
//   max = max score      sum = sum of 2^(score - max)      out = sum of 2^(score - max) * value
//
// A row that sees no key of the part has max = -inf, sum = 0, out = 0.
struct AttentionPart {
    float* max;  // [num_rows]
    float* sum;  // [num_rows]
    float* out;  // [num_rows][head_dim], 64-byte aligned
};

inline constexpr int max_tile_rows = 64;
// Parts are cut at multiples of this position, whoever computes them: so a row's bits depend on its own
// tokens alone. A part costs (2 + D) * 4 bytes a row where it must be kept, 2 % of the keys and values it
// stands for.
inline constexpr int part_tokens = 256;

std::size_t attend_scratch_bytes(int head_dim);

// The positions [begin, end) of one part.
using Attend = void (*)(const AttentionTile& tile, int begin, int end, const AttentionPart& part);

struct AttentionKernels {
    int query_item_bytes;  // a packed query row is head_dim of these
    void (*pack_query)(const std::uint16_t* from, int head_dim, std::byte* to);
    // By KvFormat. Each row is one fixed sequence of operations, whatever rows are beside it.
    Attend attend[2];
    // total = total + part. total may be the part's equal in everything but the memory.
    void (*fold)(int num_rows, int head_dim, const AttentionPart& total, const AttentionPart& part);
    // One row: out / sum as bf16.
    void (*finish)(const float* out, float sum, int head_dim, std::uint16_t* to);
    // One token, head by head: rotate the first 2 * half dims; `from` may be `to`.
    void (*rotate)(const std::uint16_t* from, const float* angles, int num_heads, int head_dim, int half,
                   std::uint16_t* to);
    // One token of one head into its granule; by KvFormat.
    void (*write_key[2])(const std::uint16_t* from, int head_dim, int token, std::byte* granule);
    void (*write_value[2])(const std::uint16_t* from, int head_dim, int token, std::byte* granule);
};

const AttentionKernels& attention_kernels(Isa isa);

// Each appends one operation; the arguments are those of the functions of the same names in _native.pyi. They
// throw std::invalid_argument for references that do not fit together.
struct RopeAnglesArgs {
    Ref positions;
    const float* frequencies;
    int num_frequencies;
    float factor;
    Ref out;
};
void add_rope_angles(Program& program, const RopeAnglesArgs& args);

struct RopeArgs {
    Ref x;
    int head_dim;
    Ref angles;
    Ref out;
};
void add_rope(Program& program, const RopeArgs& args);

struct WriteKvArgs {
    Ref keys;
    Ref values;
    int layer;
    KvShape shape;
};
void add_write_kv(Program& program, const WriteKvArgs& args);
void add_rope_write_kv(Program& program, const Ref& query, const Ref& angles, const WriteKvArgs& args);

struct AttentionArgs {
    Ref query;
    int layer;
    int num_heads;
    KvShape shape;
    float scale;
    int window;
    float softcap;
    Ref out;
};
void add_attention(Program& program, const AttentionArgs& args);

}  // namespace penstock
