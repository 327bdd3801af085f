// The order of a row's passes, and who runs them. See penstock/sampling.h; the passes are in kernels.inl.
#include "penstock/sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "draw.h"
#include "edits.h"
#include "row.h"

namespace penstock {

namespace {

// Parts a thread that a row is cut into where rows are few, so that a thread that is late costs little.
constexpr std::int64_t parts_per_thread = 2;

const SamplingKernels& sampling_kernels(Isa isa) {
#if defined(__x86_64__)
    if (isa >= Isa::avx512) return sampling_kernels_avx512();
    if (isa == Isa::avx2) return sampling_kernels_avx2();
#else
    (void)isa;
#endif
    return sampling_kernels_scalar();
}

// Of maxima that come with the logits.
constexpr std::int64_t given_block_tokens = 32, given_strip_blocks = 32;

std::size_t aligned_bytes(std::size_t item, std::int64_t count) {
    return (item * static_cast<std::size_t>(count) + cache_line - 1) / cache_line * cache_line;
}

// Bytes of the arrays of a row and of a thread's scratch.
struct Sizes {
    explicit Sizes(std::int64_t vocab)
        : values(aligned_bytes(sizeof(float), vocab)),
          maxima(aligned_bytes(sizeof(float), vocab / block_tokens + most_lanes + 1)),
          blocks(aligned_bytes(sizeof(float), maxima_stride_of(vocab))),
          columns(aligned_bytes(sizeof(float), vocab / column_tokens + 1)),
          ids(aligned_bytes(sizeof(std::int64_t), vocab)) {}

    std::size_t values, maxima, blocks, columns, ids;

    std::size_t row() const { return 2 * values + maxima + columns; }
    std::size_t scratch() const { return blocks + 2 * ids; }
};

template <class T>
T* take(std::byte*& at, std::size_t bytes) {
    return reinterpret_cast<T*>(std::exchange(at, at + bytes));
}

Range part_of(std::int64_t total, std::int64_t part, std::int64_t num_parts) {
    return {total * part / num_parts, total * (part + 1) / num_parts};
}

DrawParams draw_params(const SampleCall& call, std::int64_t r) {
    const double k = call.top_k[r];
    const std::int64_t top_k =
        k > 0.0 && k < static_cast<double>(call.vocab) ? static_cast<std::int64_t>(k) : 0;
    return {call.temperatures[r], top_k, call.top_p[r], call.min_p[r], call.uniforms[r]};
}

bool is_greedy(const SampleCall& call, std::int64_t r) { return call.temperatures[r] == 0.0; }

// The passes of one row, in their order. Between them a barrier, where several threads share the row.
struct Passes {
    const SampleCall& call;
    const SamplingKernels& kernels;

    void open(std::int64_t r, SampledRow& row) const {
        row.vocab = call.vocab;
        row.raw = row.logits = call.logits + call.rows[r] * call.row_stride;
        if (call.maxima) {
            row.maxima = call.maxima + call.rows[r] * call.maxima_stride;
            row.strip_tokens = given_strip_blocks * given_block_tokens;
            row.strip_blocks = given_strip_blocks;
        } else {
            lay_out_scan(row);
        }
    }

    void lay_out_scan(SampledRow& row) const {
        row.maxima = row.scanned;
        row.strip_tokens = kernels.strip_tokens;
        row.strip_blocks = kernels.strip_blocks;
    }

    // Unless the maxima came with the logits.
    void scan(const SampledRow& row, Range strips) const {
        if (row.maxima == row.scanned) kernels.scan(row.logits, row.vocab, strips, row.scanned);
    }
    void scan_all(const SampledRow& row) const { scan(row, {0, row.num_strips()}); }
    void scan_again(SampledRow& row) const {
        lay_out_scan(row);
        scan_all(row);
    }

    // Its soundness, and its edits.
    void settle(std::int64_t r, SampledRow& row, const SampleScratch& scratch) const {
        row.highest = row.raw_highest = kernels.largest(row.maxima, row.num_blocks());
        call.tokens[r] = 0;
        call.statuses[r] = std::isfinite(row.highest) ? SampleStatus::drawn : SampleStatus::not_finite;
        const RowEdits* edits = call.edits.empty() ? nullptr : call.edits[static_cast<std::size_t>(r)];
        if (call.statuses[r] != SampleStatus::drawn || !edits) return;
        std::memcpy(row.edited, row.raw, sizeof(float) * static_cast<std::size_t>(row.vocab));
        apply(*edits, row.vocab, row.edited, reinterpret_cast<float*>(scratch.ids));
        row.logits = row.edited;
        scan_again(row);
        row.highest = kernels.largest(row.maxima, row.num_blocks());
        if (!std::isfinite(row.highest)) call.statuses[r] = SampleStatus::none_allowed;
    }

    bool is_weighed(std::int64_t r) const {
        return call.statuses[r] == SampleStatus::drawn && !is_greedy(call, r) &&
               needs_columns(draw_params(call, r));
    }

    void weigh(std::int64_t r, const SampledRow& row, Range columns) const {
        if (!is_weighed(r)) return;
        const Softmax softmax{row.highest, static_cast<float>(1.0 / call.temperatures[r])};
        float* weights = needs_weights(draw_params(call, r)) ? row.weights : nullptr;
        kernels.weigh(row.logits, row.vocab, softmax, columns, row.num_columns(), row.columns, weights);
    }

    void finish(std::int64_t r, SampledRow& row, const SampleScratch& scratch) const {
        if (call.statuses[r] != SampleStatus::drawn) return;
        call.tokens[r] = is_greedy(call, r) ? first_highest(kernels, row)
                                            : draw(kernels, row, draw_params(call, r), scratch);
        if (call.num_top && call.num_top[r] >= 0) write_logprobs(r, row, scratch);
    }

    // Of the raw logits, whatever the edits were.
    void write_logprobs(std::int64_t r, SampledRow& row, const SampleScratch& scratch) const {
        if (row.logits != row.raw) {
            row.logits = row.raw;
            row.highest = row.raw_highest;
            scan_again(row);
        }
        kernels.weigh(row.raw, row.vocab, {row.highest, 1.0f}, {0, row.num_columns()}, row.num_columns(),
                      row.columns, nullptr);
        const double log_total = static_cast<double>(row.highest) + std::log(total_of(row));
        const std::int64_t token = call.tokens[r];
        const float value = row.raw[token];
        call.logprobs[r] = static_cast<double>(value) - log_total;
        const std::int64_t equal_before = kernels.count_above(row.raw, token, value, true) -
                                          kernels.count_above(row.raw, token, value, false);
        call.ranks[r] = 1 + kernels.count_above(row.raw, row.vocab, value, false) + equal_before;
        if (call.num_top[r] == 0) return;
        const Candidates top = top_candidates(kernels, row, call.num_top[r], true, scratch);
        for (std::int64_t i = 0; i < top.num; ++i) {
            call.top_ids[r * call.max_top + i] = top.id(i);
            call.top_logprobs[r * call.max_top + i] = static_cast<double>(top.value(i)) - log_total;
        }
    }
};

// Enough rows for all threads: each takes whole ones.
void sample_whole_rows(const Passes& passes, Worker& worker, SampledRow& row, const SampleScratch& scratch) {
    worker.share(passes.call.num_rows, [&](std::int64_t r) {
        passes.open(r, row);
        passes.scan_all(row);
        passes.settle(r, row, scratch);
        passes.weigh(r, row, {0, row.num_columns()});
        passes.finish(r, row, scratch);
    });
}

// Few rows: the passes over the vocabulary are shared.
void sample_split_rows(const Passes& passes, Worker& worker, SampledRow* rows, const SampleScratch& scratch) {
    const std::int64_t num_rows = passes.call.num_rows, num_parts = parts_per_thread * worker.count;
    worker.share(num_rows * num_parts, [&](std::int64_t i) {
        const SampledRow& row = rows[i / num_parts];
        passes.scan(row, part_of(row.num_strips(), i % num_parts, num_parts));
    });
    worker.barrier();
    worker.share(num_rows, [&](std::int64_t r) { passes.settle(r, rows[r], scratch); });
    worker.barrier();
    worker.share(num_rows * num_parts, [&](std::int64_t i) {
        const SampledRow& row = rows[i / num_parts];
        passes.weigh(i / num_parts, row, part_of(row.num_columns(), i % num_parts, num_parts));
    });
    worker.barrier();
    worker.share(num_rows, [&](std::int64_t r) { passes.finish(r, rows[r], scratch); });
}

}  // namespace

TokenSampler::TokenSampler(std::shared_ptr<Pool> pool, Isa isa)
    : pool_(std::move(pool)), kernels_(sampling_kernels(isa)) {}

TokenSampler::~TokenSampler() = default;

void TokenSampler::reserve(std::int64_t vocab) {
    if (vocab <= vocab_) return;
    const Sizes sizes(vocab);
    const auto threads = static_cast<std::size_t>(pool_->num_threads());
    rows_.clear();
    scratches_.clear();
    memory_ = HugeBuffer();
    memory_ = HugeBuffer(threads * (2 * sizes.row() + sizes.scratch()));
    std::byte* at = memory_.data();
    for (std::size_t i = 0; i < 2 * threads; ++i) {
        rows_.push_back({take<float>(at, sizes.values), take<float>(at, sizes.maxima),
                         take<float>(at, sizes.columns), take<float>(at, sizes.values)});
    }
    for (std::size_t i = 0; i < threads; ++i) {
        scratches_.push_back({take<float>(at, sizes.blocks), take<std::int64_t>(at, sizes.ids),
                              take<std::uint64_t>(at, sizes.ids)});
    }
    vocab_ = vocab;
}

void TokenSampler::sample(const SampleCall& call) {
    for (const RowEdits* edits : call.edits) {
        if (edits) require_ids(*edits, call.vocab);
    }
    reserve(call.vocab);
    const Passes passes{call, kernels_};
    const bool is_split = pool_->num_threads() > 1 && call.num_rows < 2 * pool_->num_threads();
    for (std::int64_t r = 0; is_split && r < call.num_rows; ++r)
        passes.open(r, rows_[static_cast<std::size_t>(r)]);
    pool_->run([&](Worker& worker) {
        const auto id = static_cast<std::size_t>(worker.id);
        if (is_split) {
            sample_split_rows(passes, worker, rows_.data(), scratches_[id]);
        } else {
            sample_whole_rows(passes, worker, rows_[id], scratches_[id]);
        }
    });
}

std::int64_t maxima_stride_of(std::int64_t vocab) {
    constexpr std::int64_t strip = given_block_tokens * given_strip_blocks;
    return (vocab + strip - 1) / strip * given_strip_blocks;
}

void rows_are_finite(Pool& pool, Isa isa, const std::byte* data, bool is_bf16, std::int64_t num_rows,
                     std::int64_t cols, std::int64_t row_bytes, std::uint8_t* out) {
    const SamplingKernels& kernels = sampling_kernels(isa);
    constexpr std::int64_t values_per_task = 32768;  // a microsecond or two
    const std::int64_t per_task =
        std::max<std::int64_t>(1, values_per_task / std::max<std::int64_t>(1, cols));
    const auto check = [&](std::int64_t r) {
        const std::byte* row = data + r * row_bytes;
        out[r] = is_bf16 ? kernels.is_finite_bf16(reinterpret_cast<const std::uint16_t*>(row), cols)
                         : kernels.is_finite_f32(reinterpret_cast<const float*>(row), cols);
    };
    if (num_rows <= per_task) {  // waking the other threads would take longer
        for (std::int64_t r = 0; r < num_rows; ++r) check(r);
        return;
    }
    pool.run([&](Worker& worker) {
        worker.share((num_rows + per_task - 1) / per_task, [&](std::int64_t task) {
            const std::int64_t end = std::min(num_rows, (task + 1) * per_task);
            for (std::int64_t r = task * per_task; r < end; ++r) check(r);
        });
    });
}

}  // namespace penstock
