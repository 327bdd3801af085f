// The draw of penstock/engine/sampling/{draw,nucleus}.py for one row; its sums have the same order as there.
#include "draw.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace penstock {

namespace {

// FEW_CANDIDATES and SMALL_VOCAB of draw.py: what is looked at first for a nucleus, and where that does not pay.
constexpr std::int64_t few_candidates = 128;
constexpr std::int64_t small_vocab = 8192;
// LOW_BITS of nucleus.py: a weight's bits above these are its bucket; 1.0 lies in bucket 1016.
constexpr int low_bits = 20;
constexpr std::int64_t last_bucket = 1016;

constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// [ 32 bits: the float as an ordered integer, complemented | 32 bits: id ]: smaller keys come first.
std::uint64_t order_key(float value, std::int64_t id) {
    const std::uint32_t bits = bits_of(value + 0.0f);  // adding 0 makes -0.0 equal to 0.0
    const std::uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<std::uint64_t>(~rising) << 32 | static_cast<std::uint64_t>(id);
}

// The point on the CDF, below its end even where the product is rounded up to it.
double target_of(double uniform, double total) { return std::min(uniform * total, std::nextafter(total, 0.0)); }

Softmax softmax_of(const SampledRow& row, const DrawParams& params) {
    return {row.highest, static_cast<float>(1.0 / params.temperature)};
}

// The smallest float that is at least `value`: comparing with it is comparing with the double.
float rounded_up(double value) {
    const auto nearest = static_cast<float>(value);
    return static_cast<double>(nearest) < value ? std::nextafterf(nearest, 2.0f) : nearest;
}

// A block maximum that at least k tokens reach, or -inf.
float candidate_bound(const SamplingKernels& kernels, const SampledRow& row, std::int64_t k, float* blocks) {
    const std::int64_t num_blocks = row.num_blocks(kernels);
    if (k > num_blocks) return minus_infinity;
    std::copy_n(row.maxima, num_blocks, blocks);
    std::nth_element(blocks, blocks + k - 1, blocks + num_blocks, [](float a, float b) { return a > b; });
    return blocks[k - 1];
}

// First the column that holds the target, then the token in it, whose weights `weights_in(column, out)` gives.
template <class WeightsIn>
std::int64_t pick(const SampledRow& row, double uniform, WeightsIn weights_in) {
    const std::int64_t num_columns = row.num_columns();
    const double target = target_of(uniform, total_of(row));
    double running = 0.0;
    std::int64_t column = 0;
    for (;; ++column) {
        running += static_cast<double>(row.columns[column]);
        if (running > target || column + 1 == num_columns) break;
    }
    const double before = running - static_cast<double>(row.columns[column]);
    float inside[column_tokens] = {};
    weights_in(column, inside);
    double mass = 0.0;
    for (const float weight : inside) mass += static_cast<double>(weight);
    const double rest = std::clamp(target - before, 0.0, std::nextafter(mass, 0.0));
    double sum = 0.0;
    for (std::int64_t i = 0; i < column_tokens; ++i) {
        sum += static_cast<double>(inside[i]);
        if (sum > rest) return i * num_columns + column;
    }
    return row.vocab - 1;  // not reached: the last running sum is above `rest`
}

std::int64_t draw_from_all(const SamplingKernels& kernels, const SampledRow& row, const DrawParams& params) {
    return pick(row, params.uniform, [&](std::int64_t column, float* weights) {
        float logits[column_tokens];
        std::fill_n(logits, column_tokens, minus_infinity);
        std::int64_t i = 0;
        for (std::int64_t id = column; id < row.vocab; id += row.num_columns()) logits[i++] = row.logits[id];
        kernels.weights(logits, column_tokens, softmax_of(row, params), weights);
    });
}

// From weights that filters have set to 0 where they dropped a token.
std::int64_t draw_from_weights(const SamplingKernels& kernels, const SampledRow& row, double uniform,
                               const float* weights) {
    kernels.column_sums(weights, row.vocab, row.num_columns(), row.columns);
    return pick(row, uniform, [&](std::int64_t column, float* inside) {
        std::int64_t i = 0;
        for (std::int64_t id = column; id < row.vocab; id += row.num_columns()) inside[i++] = weights[id];
    });
}

std::int64_t draw_with_min_p(const SamplingKernels& kernels, const SampledRow& row, const DrawParams& params,
                             const SampleScratch& scratch) {
    kernels.weights(row.logits, row.vocab, softmax_of(row, params), scratch.weights);
    kernels.cut(scratch.weights, row.vocab, -1.0f, 0, rounded_up(params.min_p));
    return draw_from_weights(kernels, row, params.uniform, scratch.weights);
}

// How many of the candidates the filters keep; more than there are where they do not tell.
// `total` is the mass of which top-p takes its share; below 0 it is that of the candidates.
struct Kept {
    std::int64_t length;
    std::int64_t token;  // the draw from them
};

Kept keep(const Candidates& candidates, double total, const DrawParams& params, double* mass) {
    const double first = static_cast<double>(candidates.value(0));
    double sum = 0.0;
    std::int64_t likely = 0;  // at least min_p times as likely as the first
    for (std::int64_t i = 0; i < candidates.num; ++i) {
        const double weight = std::exp((static_cast<double>(candidates.value(i)) - first) / params.temperature);
        likely += weight >= params.min_p;
        mass[i] = sum += weight;
    }
    const std::int64_t more = candidates.num + 1;
    std::int64_t length = likely == candidates.num ? more : likely;
    if (params.top_p < 1.0) {
        const double share = params.top_p * (total < 0.0 ? sum : total);
        const std::int64_t nucleus = 1 + (std::lower_bound(mass, mass + candidates.num, share) - mass);
        length = std::min(length, nucleus);
    }
    const double kept_mass = mass[std::min(length, candidates.num) - 1];
    const double target = target_of(params.uniform, kept_mass);
    return {length, candidates.id(std::upper_bound(mass, mass + candidates.num, target) - mass)};
}

// The running sums lie where the candidates' ids were found.
double* masses_in(const SampleScratch& scratch) { return reinterpret_cast<double*>(scratch.ids); }

std::int64_t draw_with_top_k(const SamplingKernels& kernels, const SampledRow& row, const DrawParams& params,
                             const SampleScratch& scratch) {
    const Candidates candidates = top_candidates(kernels, row, params.top_k, false, scratch);
    return keep(candidates, -1.0, params, masses_in(scratch)).token;
}

// The bucket in which the nucleus ends, and the mass of the buckets above it.
struct Border {
    std::int64_t bucket;
    double before;
};

// Ten thresholds a pass: 1017 buckets are told apart in three passes.
Border find_border(const SamplingKernels& kernels, const float* weights, std::int64_t vocab, double share) {
    std::int64_t low = 0, high = last_bucket + 1;  // mass(>= low) >= share > mass(>= high)
    double above = 0.0;
    while (high - low > 1) {
        const int count = static_cast<int>(std::min<std::int64_t>(max_thresholds, high - low - 1));
        float thresholds[max_thresholds];
        double sums[max_thresholds];
        std::int64_t buckets[max_thresholds];
        for (int t = 0; t < count; ++t) {
            buckets[t] = low + (high - low) * (t + 1) / (count + 1);
            thresholds[t] = float_of(static_cast<std::uint32_t>(buckets[t]) << low_bits);
        }
        kernels.masses(weights, vocab, thresholds, count, sums);
        for (int t = count - 1; t >= 0; --t) {
            if (sums[t] >= share) {
                low = buckets[t];
                break;
            }
            high = buckets[t];
            above = sums[t];
        }
    }
    return {low, above};
}

double weight_in(std::uint64_t key) { return static_cast<double>(float_of(~static_cast<std::uint32_t>(key >> 32))); }

// Of keys in any order, the one at which the running mass of the sorted keys first reaches `rest`; the last if none
// does. Quickselect by mass: keys are parted around the median until one is left.
std::uint64_t key_at_mass(std::uint64_t* keys, std::int64_t count, double rest) {
    std::int64_t start = 0, end = count;
    double before = 0.0;
    while (end - start > 1) {
        const std::int64_t middle = start + (end - start) / 2;
        std::nth_element(keys + start, keys + middle, keys + end);
        double lower = 0.0;
        for (std::int64_t i = start; i < middle; ++i) lower += weight_in(keys[i]);
        if (before + lower >= rest) {
            end = middle;
        } else {
            before += lower;
            start = middle;
        }
    }
    return keys[start];
}

// Set all weights to 0 that lie outside the nucleus or below min_p.
void keep_nucleus(const SamplingKernels& kernels, const SampledRow& row, const DrawParams& params, double total,
                  const SampleScratch& scratch) {
    const double share = params.top_p * total;
    const Border border = find_border(kernels, scratch.weights, row.vocab, share);
    if (border.bucket == 0) {  // it ends among weights that are 0 but for rounding
        kernels.cut(scratch.weights, row.vocab, -1.0f, 0, rounded_up(params.min_p));
        return;
    }
    const auto bucket_bits = static_cast<std::uint32_t>(border.bucket) << low_bits;
    const std::int64_t found = kernels.collect(scratch.weights, row.vocab, float_of(bucket_bits), true, scratch.ids);
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < found; ++i) {
        const std::int64_t id = scratch.ids[i];
        const std::uint32_t bits = bits_of(scratch.weights[id]);
        if (bits >> low_bits != static_cast<std::uint32_t>(border.bucket)) continue;
        scratch.keys[count++] = static_cast<std::uint64_t>(~bits) << 32 | static_cast<std::uint64_t>(id);
    }
    const std::uint64_t last = key_at_mass(scratch.keys, count, share - border.before);
    const float weight = float_of(~static_cast<std::uint32_t>(last >> 32));
    kernels.cut(scratch.weights, row.vocab, weight, static_cast<std::int64_t>(last & 0xffffffffu),
                rounded_up(params.min_p));
}

std::int64_t draw_with_top_p(const SamplingKernels& kernels, const SampledRow& row, const DrawParams& params,
                             const SampleScratch& scratch) {
    const double total = total_of(row);
    if (row.vocab > small_vocab) {
        const Candidates few = top_candidates(kernels, row, few_candidates, false, scratch);
        const Kept kept = keep(few, total, params, masses_in(scratch));
        if (kept.length <= few.num) return kept.token;
    }
    kernels.weights(row.logits, row.vocab, softmax_of(row, params), scratch.weights);
    keep_nucleus(kernels, row, params, total, scratch);
    return draw_from_weights(kernels, row, params.uniform, scratch.weights);
}

}  // namespace

float Candidates::value(std::int64_t i) const {
    const std::uint32_t rising = ~static_cast<std::uint32_t>(keys[i] >> 32);
    return float_of(rising & 0x80000000u ? rising & 0x7fffffffu : ~rising);
}

Candidates top_candidates(const SamplingKernels& kernels, const SampledRow& row, std::int64_t k, bool with_impossible,
                          const SampleScratch& scratch) {
    k = std::min(k, row.vocab);
    const float bound = candidate_bound(kernels, row, k, scratch.blocks);
    const bool with_equal = with_impossible || bound > minus_infinity;
    const std::int64_t found = kernels.collect(row.logits, row.vocab, bound, with_equal, scratch.ids);
    for (std::int64_t i = 0; i < found; ++i) scratch.keys[i] = order_key(row.logits[scratch.ids[i]], scratch.ids[i]);
    const std::int64_t num = std::min(k, found);
    if (num < found) std::nth_element(scratch.keys, scratch.keys + num, scratch.keys + found);
    std::sort(scratch.keys, scratch.keys + num);
    return {scratch.keys, num};
}

double total_of(const SampledRow& row) {
    double total = 0.0;
    for (std::int64_t c = 0; c < row.num_columns(); ++c) total += static_cast<double>(row.columns[c]);
    return total;
}

std::int64_t first_highest(const SamplingKernels& kernels, const SampledRow& row) {
    const std::int64_t block = kernels.find(row.maxima, row.num_blocks(kernels), row.highest);
    const std::int64_t start = block / kernels.strip_blocks * kernels.strip_tokens;
    return start + kernels.find(row.logits + start, row.vocab - start, row.highest);
}

bool needs_columns(const DrawParams& params) {
    return params.top_k == 0 && (params.top_p < 1.0 || params.min_p == 0.0);
}

std::int64_t draw(const SamplingKernels& kernels, const SampledRow& row, const DrawParams& params,
                  const SampleScratch& scratch) {
    if (params.top_k > 0) return draw_with_top_k(kernels, row, params, scratch);
    if (params.top_p < 1.0) return draw_with_top_p(kernels, row, params, scratch);
    if (params.min_p > 0.0) return draw_with_min_p(kernels, row, params, scratch);
    return draw_from_all(kernels, row, params);
}

}  // namespace penstock
