// The draw of penstock/engine/sampling/{draw,nucleus}.py for one row; its sums have the same order as there.
#include "draw.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace penstock {

namespace {

// FEW_CANDIDATES and SMALL_VOCAB of draw.py: what is looked at first for a nucleus, and where that does not
// pay.
constexpr std::int64_t few_candidates = 128;
constexpr std::int64_t small_vocab = 8192;

// A nucleus' border is looked for among weights as integers (their bits rise with them; 2^23 double a
// weight), until it is known to 2^18: 3 %, some hundreds of a large vocabulary's tokens.
constexpr std::uint32_t close_enough = 1u << 18;
constexpr std::uint32_t above_all_weights = 0x3f800001;  // weights are at most 1.0
// A guess comes from this share of the row, in runs of this many tokens: a pass over it costs an eighth.
constexpr std::int64_t sample_stride = 8;
constexpr std::int64_t sample_run = 4096;
constexpr std::int64_t sampled_vocab = 1 << 16;  // smaller rows are not sampled

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float minus_infinity = -infinity;

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
double target_of(double uniform, double total) {
    return std::min(uniform * total, std::nextafter(total, 0.0));
}

Softmax softmax_of(const SampledRow& row, const DrawParams& params) {
    return {row.highest, static_cast<float>(1.0 / params.temperature)};
}

// The smallest float that is at least `value`: comparing with it is comparing with the double.
float rounded_up(double value) {
    const auto nearest = static_cast<float>(value);
    return static_cast<double>(nearest) < value ? std::nextafterf(nearest, 2.0f) : nearest;
}

// Groups of blocks of which the k-th highest maximum is looked for, for each candidate: so many that few
// groups hold two of the k likeliest tokens, whose number the bound then misses by little.
constexpr std::int64_t groups_per_candidate = 8;

// A maximum of some blocks that at least k tokens reach, or -inf.
float candidate_bound(const SampledRow& row, std::int64_t k, float* groups) {
    const std::int64_t num_blocks = row.num_blocks();
    if (k > num_blocks) return minus_infinity;
    const std::int64_t num_groups = std::min(num_blocks, groups_per_candidate * k);
    std::copy_n(row.maxima, num_groups, groups);
    for (std::int64_t start = num_groups; start < num_blocks; start += num_groups) {
        const std::int64_t here = std::min(num_groups, num_blocks - start);
        for (std::int64_t i = 0; i < here; ++i) groups[i] = std::max(groups[i], row.maxima[start + i]);
    }
    std::nth_element(groups, groups + k - 1, groups + num_groups, [](float a, float b) { return a > b; });
    return groups[k - 1];
}

// The ids of the tokens from `low` up, rising; only strips with such a maximum are read.
std::int64_t collect_from(const SamplingKernels& kernels, const SampledRow& row, float low,
                          std::int64_t* ids) {
    std::int64_t found = 0;
    for (std::int64_t strip = 0; strip < row.num_strips(); ++strip) {
        const float* maxima = row.maxima + strip * row.strip_blocks;
        bool has_any = false;
        for (std::int64_t i = 0; i < row.strip_blocks; ++i) has_any |= maxima[i] >= low;
        if (!has_any) continue;
        const std::int64_t start = strip * row.strip_tokens;
        const std::int64_t end = std::min<std::int64_t>(row.vocab, start + row.strip_tokens);
        const std::int64_t here =
            kernels.collect(row.logits + start, end - start, low, infinity, ids + found);
        for (std::int64_t i = 0; i < here; ++i) ids[found++] += start;
    }
    return found;
}

// First the column that holds the target, then the token in it, whose weights `weights_in(column, out)`
// gives.
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

// From weights of which filters have set some to 0, and their columns' sums.
std::int64_t draw_from_weights(const SampledRow& row, double uniform) {
    return pick(row, uniform, [&](std::int64_t column, float* inside) {
        std::int64_t i = 0;
        for (std::int64_t id = column; id < row.vocab; id += row.num_columns()) inside[i++] = row.weights[id];
    });
}

// Drop what is below min_p and what comes after (weight, id).
void cut(const SamplingKernels& kernels, const SampledRow& row, float weight, std::int64_t id, double min_p) {
    kernels.cut(row.weights, row.vocab, weight, id, rounded_up(min_p), row.num_columns(), row.columns);
}

std::int64_t draw_with_min_p(const SamplingKernels& kernels, const SampledRow& row,
                             const DrawParams& params) {
    cut(kernels, row, -1.0f, 0, params.min_p);
    return draw_from_weights(row, params.uniform);
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
        const double weight =
            std::exp((static_cast<double>(candidates.value(i)) - first) / params.temperature);
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

// Where the nucleus ends: at a weight whose bits are in [low, high). `above` is the mass of those from `high`
// up.
struct Border {
    std::uint32_t low;   // mass(>= low) >= share
    std::uint32_t high;  // mass(>= high) < share
    double above;
};

// The masses above some thresholds, of the whole row or of a sample.
struct MassPass {
    const SamplingKernels& kernels;
    const SampledRow& row;
    std::int64_t run;     // tokens looked at together
    std::int64_t stride;  // one run of this many is looked at

    std::int64_t num_tokens() const {
        std::int64_t num = 0;
        for (std::int64_t start = 0; start < row.vocab; start += run * stride)
            num += std::min(run, row.vocab - start);
        return num;
    }

    void operator()(const float* thresholds, int count, double* sums) const {
        std::fill_n(sums, count, 0.0);
        for (std::int64_t start = 0; start < row.vocab; start += run * stride) {
            double parts[max_thresholds];
            kernels.masses(row.weights + start, std::min(run, row.vocab - start), thresholds, count, parts);
            for (int t = 0; t < count; ++t) sums[t] += parts[t];
        }
    }
};

// One pass: tighten the border by thresholds of rising bits inside it.
void tighten(Border& border, const MassPass& pass, double share, const std::uint32_t* bits, int count) {
    float thresholds[max_thresholds];
    double sums[max_thresholds];
    for (int t = 0; t < count; ++t) thresholds[t] = float_of(bits[t]);
    pass(thresholds, count, sums);
    for (int t = count - 1; t >= 0; --t) {
        if (sums[t] >= share) {
            border.low = bits[t];
            return;
        }
        border.high = bits[t];
        border.above = sums[t];
    }
}

// Passes with thresholds at equal distances.
void narrow(Border& border, const MassPass& pass, double share) {
    while (border.high - border.low > close_enough) {
        std::uint32_t bits[max_thresholds];
        for (std::uint32_t t = 0; t < max_thresholds; ++t) {
            bits[t] = border.low + (border.high - border.low) / (max_thresholds + 1) * (t + 1);
        }
        tighten(border, pass, share, bits, max_thresholds);
    }
}

// The border of a sample of the row, as bits; 0 where the sample says nothing.
//
// It is where the sample's tail holds its part of the row's tail: tail tokens are many and alike, so this
// part is known to about a percent, while the mass of the few likeliest tokens depends on whether they are in
// the sample.
std::uint32_t sampled_border(const Border& border, const SamplingKernels& kernels, const SampledRow& row,
                             double tail_mass) {
    const MassPass sample{kernels, row, sample_run, sample_stride};
    const float least = 0.0f;
    double total = 0.0;
    sample(&least, 1, &total);
    const double share =
        total - tail_mass * static_cast<double>(sample.num_tokens()) / static_cast<double>(row.vocab);
    if (share <= 0.0) return 0;
    Border guess = border;
    narrow(guess, sample, share);
    return guess.low + (guess.high - guess.low) / 2;
}

// One pass with thresholds at these distances to each side of a guess.
void tighten_around(Border& border, std::uint32_t guess, const MassPass& whole, double share,
                    const std::uint32_t* distances, int num_distances) {
    std::uint32_t bits[max_thresholds];
    for (int i = 0; i < num_distances; ++i) {
        bits[num_distances - 1 - i] = std::clamp(guess - distances[i], border.low, border.high);
        bits[num_distances + i] = std::clamp(guess + distances[i], border.low, border.high);
    }
    tighten(border, whole, share, bits, 2 * num_distances);
}

// The usual error of a sample is 1 or 2 %; if it is more, a second pass catches it within a doubling.
void tighten_by_sample(Border& border, std::uint32_t guess, const MassPass& whole, double share) {
    constexpr std::uint32_t near[] = {1u << 16, 1u << 18};
    constexpr std::uint32_t far[] = {1u << 19, 1u << 20, 1u << 21, 1u << 22, 1u << 23};
    tighten_around(border, guess, whole, share, near, 2);
    if (border.high - border.low > close_enough) tighten_around(border, guess, whole, share, far, 5);
}

Border find_border(const SamplingKernels& kernels, const SampledRow& row, double top_p, double total) {
    const double share = top_p * total;
    // The tokens behind the border hold what the nucleus leaves: it lies at no less than their mean weight.
    const double least = std::max(0.999 * (1.0 - top_p) * total / static_cast<double>(row.vocab), 1e-37);
    Border border{bits_of(static_cast<float>(least)), above_all_weights, 0.0};
    const MassPass whole{kernels, row, row.vocab, 1};
    const std::uint32_t guess =
        row.vocab >= sampled_vocab ? sampled_border(border, kernels, row, total - share) : 0;
    if (guess) tighten_by_sample(border, guess, whole, share);
    narrow(border, whole, share);
    return border;
}

double weight_in(std::uint64_t key) {
    return static_cast<double>(float_of(~static_cast<std::uint32_t>(key >> 32)));
}

// Of keys in any order, the one at which the running mass of the sorted keys first reaches `rest`; the last
// if none does. Quickselect by mass: keys are parted around the median until one is left.
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
void keep_nucleus(const SamplingKernels& kernels, const SampledRow& row, const DrawParams& params,
                  double total, const SampleScratch& scratch) {
    const Border border = find_border(kernels, row, params.top_p, total);
    const float low = float_of(border.low), high = float_of(border.high);
    const std::int64_t count = kernels.collect(row.weights, row.vocab, low, high, scratch.ids);
    if (count == 0) return cut(kernels, row, low, row.vocab, params.min_p);  // sums rounded the last share away
    for (std::int64_t i = 0; i < count; ++i) {
        const std::uint64_t falling = ~bits_of(row.weights[scratch.ids[i]]);
        scratch.keys[i] = (falling & 0xffffffffu) << 32 | static_cast<std::uint64_t>(scratch.ids[i]);
    }
    const std::uint64_t last = key_at_mass(scratch.keys, count, params.top_p * total - border.above);
    const float weight = float_of(~static_cast<std::uint32_t>(last >> 32));
    cut(kernels, row, weight, static_cast<std::int64_t>(last & 0xffffffffu), params.min_p);
}

std::int64_t draw_with_top_p(const SamplingKernels& kernels, const SampledRow& row, const DrawParams& params,
                             const SampleScratch& scratch) {
    const double total = total_of(row);
    // Weights are at most 1: so many candidates cannot hold the share of a flat row.
    const bool is_flat = params.min_p == 0.0 && params.top_p * total > 1.001 * few_candidates;
    if (row.vocab > small_vocab && !is_flat) {
        const Candidates few = top_candidates(kernels, row, few_candidates, false, scratch);
        const Kept kept = keep(few, total, params, masses_in(scratch));
        if (kept.length <= few.num) return kept.token;
    }
    keep_nucleus(kernels, row, params, total, scratch);
    return draw_from_weights(row, params.uniform);
}

}  // namespace

float Candidates::value(std::int64_t i) const {
    const std::uint32_t rising = ~static_cast<std::uint32_t>(keys[i] >> 32);
    return float_of(rising & 0x80000000u ? rising & 0x7fffffffu : ~rising);
}

Candidates top_candidates(const SamplingKernels& kernels, const SampledRow& row, std::int64_t k,
                          bool with_impossible, const SampleScratch& scratch) {
    k = std::min(k, row.vocab);
    const float bound = candidate_bound(row, k, scratch.blocks);
    const float low = with_impossible ? bound : std::max(bound, -std::numeric_limits<float>::max());
    const std::int64_t found = collect_from(kernels, row, low, scratch.ids);
    for (std::int64_t i = 0; i < found; ++i)
        scratch.keys[i] = order_key(row.logits[scratch.ids[i]], scratch.ids[i]);
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
    const std::int64_t block = kernels.find(row.maxima, row.num_blocks(), row.highest);
    const std::int64_t start = block / row.strip_blocks * row.strip_tokens;
    return start + kernels.find(row.logits + start, row.vocab - start, row.highest);
}

bool needs_columns(const DrawParams& params) { return params.top_k == 0; }

bool needs_weights(const DrawParams& params) { return params.top_p < 1.0 || params.min_p > 0.0; }

std::int64_t draw(const SamplingKernels& kernels, const SampledRow& row, const DrawParams& params,
                  const SampleScratch& scratch) {
    if (params.top_k > 0) return draw_with_top_k(kernels, row, params, scratch);
    if (params.top_p < 1.0) return draw_with_top_p(kernels, row, params, scratch);
    if (params.min_p > 0.0) return draw_with_min_p(kernels, row, params);
    return draw_from_all(kernels, row, params);
}

}  // namespace penstock
