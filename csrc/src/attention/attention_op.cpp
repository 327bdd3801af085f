// Attention as an operation: which thread computes which rows over which keys.
//
// ```
// sequence -> tiles of query tokens -> KV heads (with all their query heads) -> pieces of the keys
// task = one piece of one head of one tile
// ```
//
// Mostly a task is a whole head's keys. Where few tasks stand against many keys (one long context), keys are
// cut into pieces of whole parts (`part_tokens`); parts of cut sequences go to shared memory and are folded
// after a barrier. Parts are always folded one by one, the first to the last, so that a cut changes no bit.
//
// Source: Dao et al., Flash-Decoding for long-context inference, 2023; Ye et al., FlashInfer, 2024, section
// 3.3.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "penstock/attention.h"

namespace penstock {

namespace {

constexpr std::size_t alignment = 64;
// Parts of cut sequences: 128k tokens of 32 heads of 128 dims at batch 1. What does not fit is not cut.
constexpr std::size_t shared_bytes = std::size_t{8} << 20;
constexpr int tasks_per_thread = 4;  // fewer leave threads waiting for the last task, more cost starts
// A key costs reading, as much as computing with so many rows (AVX-512, keys and values in memory).
constexpr int read_cost_rows = 8;

constexpr std::size_t align(std::size_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

// One sequence's share of the tasks.
struct SequencePlan {
    std::int64_t first_task;
    std::int64_t first_fold;   // index among the (tile, head) pairs of cut sequences
    std::int64_t shared_at;    // its parts in shared memory, in floats
    int first_row;
    int num_rows;
    int start;                 // position of its first row
    int num_tiles;
    int num_pieces;            // 1: not cut
    int num_parts;             // at most, of a tile
};

// Addresses in one thread's scratch.
struct TileScratch {
    std::byte* query;
    std::int32_t* first;
    std::int32_t* last;
    AttentionPart total;
    AttentionPart part;
    std::byte* attend;
};

AttentionPart part_at(float* at, int num_rows, int head_dim) {
    return {at + static_cast<std::int64_t>(num_rows) * head_dim,
            at + static_cast<std::int64_t>(num_rows) * (head_dim + 1), at};
}

class Attention final : public Op {
public:
    Attention(const AttentionArgs& args, const AttentionKernels& kernels)
        : args_(args),
          kernels_(kernels),
          attend_(kernels.attend[static_cast<int>(args.shape.format)]),
          heads_per_kv_(args.num_heads / args.shape.num_kv_heads),
          num_slices_((heads_per_kv_ + max_tile_rows - 1) / max_tile_rows),
          heads_per_tile_((heads_per_kv_ + num_slices_ - 1) / num_slices_),
          tokens_per_tile_(max_tile_rows / heads_per_tile_) {}

    std::string_view name() const override { return "attention"; }

    void run(const Step& step, Worker& worker) const override {
        const LayerKv& layer = step.layers[static_cast<std::size_t>(args_.layer)];
        const AttentionInputs& inputs = step.groups[static_cast<std::size_t>(layer.group)];
        std::byte* scratch = worker.scratch();
        const Run run{step, layer, inputs, reinterpret_cast<SequencePlan*>(scratch),
                      tile_scratch(scratch + plan_bytes(inputs))};
        make_plan(run, worker.count);
        const SequencePlan& end = run.plans[inputs.num_seqs];
        worker.share(end.first_task, [&](std::int64_t task) { attend_task(run, task); });
        if (end.first_fold == 0) return;
        worker.barrier();
        worker.share(end.first_fold, [&](std::int64_t fold) { fold_task(run, fold); });
    }

    std::size_t scratch_bytes(const Step& step) const override {
        const LayerKv& layer = step.layers[static_cast<std::size_t>(args_.layer)];
        return plan_bytes(step.groups[static_cast<std::size_t>(layer.group)]) + tile_bytes();
    }

private:
    static std::size_t plan_bytes(const AttentionInputs& inputs) {
        return align(static_cast<std::size_t>(inputs.num_seqs + 1) * sizeof(SequencePlan));
    }

    struct Run {
        const Step& step;
        const LayerKv& layer;
        const AttentionInputs& inputs;
        SequencePlan* plans;
        TileScratch scratch;
    };

    // A tile: tokens [token, token + num_tokens) of the sequence's rows, query heads [head, head +
    // num_heads).
    struct Tile {
        int token;
        int num_tokens;
        int kv_head;
        int head;
        int num_heads;
        int first_part;
        int num_parts;
        int end;  // one past the last position that it sees
        int num_rows() const { return num_tokens * num_heads; }
    };

    int num_head_tasks() const { return args_.shape.num_kv_heads * num_slices_; }

    int first_seen(int position) const {
        return args_.window > 0 ? std::max(0, position - args_.window + 1) : 0;
    }

    std::int64_t part_floats() const {
        return static_cast<std::int64_t>(max_tile_rows) * (args_.shape.head_dim + 2);
    }

    std::size_t tile_bytes() const {
        const std::size_t rows = max_tile_rows, dims = static_cast<std::size_t>(args_.shape.head_dim);
        return align(rows * dims * static_cast<std::size_t>(kernels_.query_item_bytes)) +
               2 * align(rows * 4) + 2 * align(static_cast<std::size_t>(part_floats()) * 4) +
               attend_scratch_bytes(args_.shape.head_dim);
    }

    TileScratch tile_scratch(std::byte* at) const {
        const auto take = [&at](std::size_t bytes) { return std::exchange(at, at + align(bytes)); };
        const std::size_t rows = max_tile_rows, dims = static_cast<std::size_t>(args_.shape.head_dim);
        TileScratch scratch;
        scratch.query = take(rows * dims * static_cast<std::size_t>(kernels_.query_item_bytes));
        scratch.first = reinterpret_cast<std::int32_t*>(take(rows * 4));
        scratch.last = reinterpret_cast<std::int32_t*>(take(rows * 4));
        for (AttentionPart* part : {&scratch.total, &scratch.part}) {
            auto* floats = reinterpret_cast<float*>(take(static_cast<std::size_t>(part_floats()) * 4));
            *part = part_at(floats, max_tile_rows, args_.shape.head_dim);
        }
        scratch.attend = at;
        return scratch;
    }

    // ---- the plan: the same in every thread

    // What the sequence's tasks cost together, in keys times rows.
    std::int64_t cost_of(const SequencePlan& plan) const {
        const std::int64_t keys = plan.start + plan.num_rows - first_seen(plan.start);
        const std::int64_t tile_rows = std::min(plan.num_rows, tokens_per_tile_) * heads_per_tile_;
        return keys * (tile_rows + read_cost_rows);
    }

    void make_plan(const Run& run, int num_threads) const {
        std::int64_t total = 0;
        for (std::int64_t s = 0; s < run.inputs.num_seqs; ++s) {
            SequencePlan& plan = run.plans[s];
            plan.first_row = run.inputs.query_start_loc[s];
            plan.num_rows = run.inputs.query_start_loc[s + 1] - plan.first_row;
            plan.start = run.inputs.seq_lens[s] - plan.num_rows;
            plan.num_tiles = (plan.num_rows + tokens_per_tile_ - 1) / tokens_per_tile_;
            total += plan.num_tiles * cost_of(plan);
        }
        const std::int64_t target = total * num_head_tasks() / (num_threads * tasks_per_thread) + 1;
        SequencePlan next{};
        for (std::int64_t s = 0; s < run.inputs.num_seqs; ++s) {
            SequencePlan& plan = run.plans[s];
            plan.first_task = next.first_task;
            plan.first_fold = next.first_fold;
            plan.shared_at = next.shared_at;
            cut(plan, num_threads > 1 ? target : 0);
            const std::int64_t tiles = static_cast<std::int64_t>(plan.num_tiles) * num_head_tasks();
            next.first_task += tiles * plan.num_pieces;
            if (plan.num_pieces == 1) continue;
            next.first_fold += tiles;
            next.shared_at += tiles * plan.num_parts * part_floats(plan);
        }
        run.plans[run.inputs.num_seqs] = next;
    }

    // Decides the number of pieces; target: what a task should cost, 0 to cut nothing.
    void cut(SequencePlan& plan, std::int64_t target) const {
        const int end = plan.start + plan.num_rows;
        plan.num_parts =
            plan.num_rows > 0 ? (end - 1) / part_tokens - first_seen(plan.start) / part_tokens + 1 : 0;
        plan.num_pieces = 1;
        if (target == 0 || plan.num_parts < 2) return;
        const std::int64_t wanted = (cost_of(plan) + target - 1) / target;
        const std::int64_t tiles = static_cast<std::int64_t>(plan.num_tiles) * num_head_tasks();
        const std::int64_t floats = plan.shared_at + tiles * plan.num_parts * part_floats(plan);
        if (floats > static_cast<std::int64_t>(shared_bytes / sizeof(float))) return;
        plan.num_pieces = static_cast<int>(std::min<std::int64_t>(wanted, plan.num_parts));
    }

    // Of one part of one of the sequence's tiles; a multiple of 16 floats.
    std::int64_t part_floats(const SequencePlan& plan) const {
        const int rows = std::min(plan.num_rows, tokens_per_tile_) * heads_per_tile_;
        return (static_cast<std::int64_t>(rows) * (args_.shape.head_dim + 2) + 15) / 16 * 16;
    }

    // ---- tasks

    template <class Start>
    const SequencePlan& plan_of(const Run& run, std::int64_t index, Start start) const {
        const SequencePlan* end = run.plans + run.inputs.num_seqs;
        const auto* after =
            std::upper_bound(run.plans, const_cast<SequencePlan*>(end), index,
                             [&](std::int64_t i, const SequencePlan& plan) { return i < plan.*start; });
        return *(after - 1);
    }

    // Tile `index` of the sequence, in the order (tile, head); the last tokens, which see the most keys,
    // first.
    Tile tile_of(const SequencePlan& plan, std::int64_t index) const {
        const int head_task = static_cast<int>(index % num_head_tasks());
        const int tile_idx = plan.num_tiles - 1 - static_cast<int>(index / num_head_tasks());
        Tile tile;
        tile.token = tile_idx * tokens_per_tile_;
        tile.num_tokens = std::min(tokens_per_tile_, plan.num_rows - tile.token);
        tile.kv_head = head_task / num_slices_;
        const int slice = head_task % num_slices_ * heads_per_tile_;
        tile.head = tile.kv_head * heads_per_kv_ + slice;
        tile.num_heads = std::min(heads_per_tile_, heads_per_kv_ - slice);
        tile.end = plan.start + tile.token + tile.num_tokens;
        tile.first_part = first_seen(plan.start + tile.token) / part_tokens;
        tile.num_parts = (tile.end - 1) / part_tokens - tile.first_part + 1;
        return tile;
    }

    void attend_task(const Run& run, std::int64_t task) const {
        const SequencePlan& plan = plan_of(run, task, &SequencePlan::first_task);
        const std::int64_t local = task - plan.first_task;
        const std::int64_t index = local / plan.num_pieces;
        const int piece = static_cast<int>(local % plan.num_pieces);
        const Tile tile = tile_of(plan, index);
        AttentionTile work = load_tile(run, plan, tile);
        if (plan.num_pieces == 1) {
            attend_whole(run, tile, work);
            store_rows(run, plan, tile, run.scratch.total);
            return;
        }
        float* parts = shared_parts(run, plan, index);
        const int from = tile.num_parts * piece / plan.num_pieces,
                  to = tile.num_parts * (piece + 1) / plan.num_pieces;
        work.fetch_end = std::min(tile.end, (tile.first_part + to) * part_tokens);
        for (int p = from; p < to; ++p) {
            attend_part(tile, work, p,
                        part_at(parts + p * part_floats(plan), tile.num_rows(), args_.shape.head_dim));
        }
    }

    void attend_part(const Tile& tile, const AttentionTile& work, int part, const AttentionPart& to) const {
        const int begin = (tile.first_part + part) * part_tokens;
        attend_(work, begin, std::min(begin + part_tokens, tile.end), to);
    }

    void attend_whole(const Run& run, const Tile& tile, const AttentionTile& work) const {
        attend_part(tile, work, 0, run.scratch.total);
        for (int p = 1; p < tile.num_parts; ++p) {
            attend_part(tile, work, p, run.scratch.part);
            kernels_.fold(tile.num_rows(), args_.shape.head_dim, run.scratch.total, run.scratch.part);
        }
    }

    void fold_task(const Run& run, std::int64_t fold) const {
        const SequencePlan& plan = plan_of(run, fold, &SequencePlan::first_fold);
        const std::int64_t index = fold - plan.first_fold;
        const Tile tile = tile_of(plan, index);
        float* parts = shared_parts(run, plan, index);
        const AttentionPart total = part_at(parts, tile.num_rows(), args_.shape.head_dim);
        for (int p = 1; p < tile.num_parts; ++p) {
            const AttentionPart part =
                part_at(parts + p * part_floats(plan), tile.num_rows(), args_.shape.head_dim);
            kernels_.fold(tile.num_rows(), args_.shape.head_dim, total, part);
        }
        store_rows(run, plan, tile, total);
    }

    float* shared_parts(const Run& run, const SequencePlan& plan, std::int64_t index) const {
        return reinterpret_cast<float*>(run.step.shared) + plan.shared_at +
               index * plan.num_parts * part_floats(plan);
    }

    AttentionTile load_tile(const Run& run, const SequencePlan& plan, const Tile& tile) const {
        const TileScratch& scratch = run.scratch;
        const int head_dim = args_.shape.head_dim;
        const Rows query = run.step.at(args_.query);
        const std::int64_t sequence = &plan - run.plans;
        for (int r = 0; r < tile.num_rows(); ++r) {
            const int token = tile.token + r / tile.num_heads, head = tile.head + r % tile.num_heads;
            scratch.last[r] = plan.start + token;
            scratch.first[r] = first_seen(plan.start + token);
            kernels_.pack_query(query.row<std::uint16_t>(plan.first_row + token) + head * head_dim, head_dim,
                                scratch.query + r * head_dim * kernels_.query_item_bytes);
        }
        return {.keys = run.layer.keys + tile.kv_head * args_.shape.head_bytes(),
                .values = run.layer.values + tile.kv_head * args_.shape.head_bytes(),
                .block_stride = run.layer.block_bytes,
                .block_table = run.inputs.block_tables + sequence * run.inputs.max_num_blocks,
                .granules_per_block = args_.shape.granules_per_block(),
                .granule_bytes = args_.shape.granule_bytes(),
                .head_dim = head_dim,
                .num_rows = tile.num_rows(),
                .first = scratch.first,
                .last = scratch.last,
                .query = scratch.query,
                .scale = args_.scale,
                .softcap = args_.softcap,
                .fetch_end = tile.end,
                .scratch = scratch.attend};
    }

    void store_rows(const Run& run, const SequencePlan& plan, const Tile& tile,
                    const AttentionPart& total) const {
        const int head_dim = args_.shape.head_dim;
        const Rows out = run.step.at(args_.out);
        for (int r = 0; r < tile.num_rows(); ++r) {
            const int token = tile.token + r / tile.num_heads, head = tile.head + r % tile.num_heads;
            kernels_.finish(total.out + r * head_dim, total.sum[r], head_dim,
                            out.row<std::uint16_t>(plan.first_row + token) + head * head_dim);
        }
    }

    AttentionArgs args_;
    const AttentionKernels& kernels_;
    Attend attend_;
    int heads_per_kv_;
    int num_slices_;  // of a KV head's query heads, where they are more than a tile holds
    int heads_per_tile_;
    int tokens_per_tile_;
};

void expect(bool is_right, const std::string& what) {
    if (!is_right) throw std::invalid_argument(what);
}

}  // namespace

void add_attention(Program& program, const AttentionArgs& args) {
    args.shape.check();
    const int cols = args.num_heads * args.shape.head_dim;
    expect(args.num_heads >= 1 && args.num_heads % args.shape.num_kv_heads == 0,
           "num_heads must be a multiple of num_kv_heads, not " + std::to_string(args.num_heads));
    expect(args.query.dtype == DType::bf16 && args.out.dtype == DType::bf16, "query and out must be bf16");
    expect(args.query.cols == cols && args.out.cols == cols,
           "query and out must have num_heads * head_dim columns");
    expect(args.layer >= 0, "layer must be 0 or more");
    expect(args.scale > 0.0f, "scale must be above 0, not " + std::to_string(args.scale));
    expect(args.window >= 0, "window must be 0 (none) or more, not " + std::to_string(args.window));
    expect(args.softcap >= 0.0f, "softcap must be 0 (none) or more, not " + std::to_string(args.softcap));
    program.reserve_shared(shared_bytes);
    program.add(std::make_unique<Attention>(args, attention_kernels(program.isa())));
}

}  // namespace penstock
