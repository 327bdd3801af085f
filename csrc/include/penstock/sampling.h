// From rows of logits to tokens: the native form of penstock/engine/sampling, which stays its reference.
//
// A row is read once from memory (its maxima, unless they came with it) and then from the core's cache: once more for the softmax's
// sums, and a few times where a filter needs it. No row is ever sorted.
//
// ```
// logits [vocab] --edits--> scan: maxima of blocks of 64, NaN --> greedy: the first token with the highest logit
//                                |
//                                |--> weigh: sums of exp((logit - highest) / temperature) by columns
//                                |           no filter: draw a column, then a token in it
//                                |           top-p: the nucleus, if 128 candidates hold it, else by thresholds
//                                `--> collect: tokens above the k-th block maximum, of which the k first are sorted
// ```
//
// The sums, their order and the order of the CDF are those of
// penstock/engine/sampling/{vocabulary,draw,nucleus}.py: the same uniform number draws the same token, but
// where it lies within 1e-5 of the mass beside a border (float32's exp and a few sums round differently).
//
// **Law**: a row's token depends on its own logits, parameters and uniform number; not on neighbours or
// threads.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "penstock/huge_buffer.h"
#include "penstock/isa.h"
#include "penstock/pool.h"

namespace penstock {

struct SamplingKernels;
struct SampledRow;
struct SampleScratch;

// What changes a row's logits before the choice, in this order; the row itself stays as it is.
struct RowEdits {
    const std::int32_t* mask = nullptr;          // [ceil(vocab / 32)], a bit for each token that may come; null allows all
    std::span<const std::int64_t> banned;        // become -inf
    std::span<const std::int64_t> biased;        // biases are added to these
    std::span<const float> biases;
    std::span<const std::int64_t> prompt;        // repetition: of prompt and answer, repeated ids count once
    std::span<const std::int64_t> answer;        // distinct ids of the answer
    std::span<const float> counts;               // beside `answer`
    float repetition = 1.0f;
    float presence = 0.0f;
    float frequency = 0.0f;
};

enum class SampleStatus : std::int32_t { drawn, not_finite, none_allowed };

// One call's rows; all arrays are [num_rows] unless said.
struct SampleCall {
    const float* logits;           // [.., vocab]
    std::int64_t row_stride;       // floats from row to row
    std::int64_t vocab;
    std::int64_t num_rows;
    const std::int64_t* rows;      // which row of `logits` each draws from; may repeat
    const double* temperatures;    // 0: greedy
    const double* top_k;           // whole; 0, -1, and from vocab up: off
    const double* top_p;           // 1: off
    const double* min_p;           // 0: off
    const double* uniforms;        // in [0, 1)
    std::span<const RowEdits* const> edits;  // [num_rows] or empty; null for none
    const std::int64_t* num_top;   // logprobs: -1 none, else how many of the likeliest; may be null
    std::int64_t max_top;          // width of the two arrays below
    std::int64_t* tokens;
    SampleStatus* statuses;
    double* logprobs;              // of the raw logits
    std::int64_t* ranks;           // from 1
    std::int64_t* top_ids;         // [num_rows, max_top]
    double* top_logprobs;          // [num_rows, max_top]
    // The largest of each 32 neighbours of a row of `logits`, NaN where there is one, and -inf up to a
    // multiple of 32 values; `maxima_stride` from row to row. Null where the rows must be read for that.
    const float* maxima = nullptr;
    std::int64_t maxima_stride = 0;
};

// The least `SampleCall::maxima_stride`.
std::int64_t maxima_stride_of(std::int64_t vocab);

class TokenSampler {
public:
    TokenSampler(std::shared_ptr<Pool> pool, Isa isa);
    ~TokenSampler();

    // Throws std::out_of_range for a token id outside the vocabulary; then nothing was drawn.
    void sample(const SampleCall& call);

    // Bytes of the scratch that stays.
    std::size_t num_bytes() const { return memory_.size(); }

private:
    void reserve(std::int64_t vocab);

    std::shared_ptr<Pool> pool_;
    const SamplingKernels& kernels_;
    HugeBuffer memory_;
    std::vector<SampledRow> rows_;         // two a thread
    std::vector<SampleScratch> scratches_; // one a thread
    std::int64_t vocab_ = 0;
};

// out[r] = 1 if no value of row r is NaN or infinite, else 0. bf16 or float32 rows.
void rows_are_finite(Pool& pool, Isa isa, const std::byte* data, bool is_bf16, std::int64_t num_rows,
                     std::int64_t cols, std::int64_t row_bytes, std::uint8_t* out);

}  // namespace penstock
