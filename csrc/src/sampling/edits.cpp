// The same arithmetic in float32, operation by operation, as
// penstock/engine/sampling/{constraints,penalties}.py.
#include "edits.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <stdexcept>
#include <string>

namespace penstock {

namespace {

constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

void require(std::span<const std::int64_t> ids, std::int64_t vocab) {
    for (const std::int64_t id : ids) {
        if (id >= 0 && id < vocab) continue;
        throw std::out_of_range("token id " + std::to_string(id) + " is outside the vocabulary of " +
                                std::to_string(vocab));
    }
}

// Most words of a grammar's mask are 0 or all ones: those cost one fill or nothing, others a write a zero
// bit.
void apply_mask(const std::int32_t* mask, std::int64_t vocab, float* row) {
    for (std::int64_t start = 0; start < vocab; start += 32) {
        const std::int64_t size = std::min<std::int64_t>(vocab - start, 32);
        const std::uint32_t inside = size == 32 ? 0xffffffffu : (1u << size) - 1u;
        std::uint32_t zeros = ~static_cast<std::uint32_t>(mask[start / 32]) & inside;
        if (zeros == inside) {
            std::fill_n(row + start, size, minus_infinity);
            continue;
        }
        for (; zeros != 0; zeros &= zeros - 1) row[start + std::countr_zero(zeros)] = minus_infinity;
    }
}

// Source: Keskar et al., CTRL (2019), section 4.1; the case of negative logits as in transformers.
float repeated(float logit, float penalty) {
    const float shrunk = logit / penalty, grown = logit * penalty;
    return (shrunk < 0.0f ? 0.0f : shrunk) + (grown > 0.0f ? 0.0f : grown);
}

// All are read before any is written, so that an id in both lists counts once.
void penalise_repetition(const RowEdits& edits, float* row, float* seen) {
    float* next = seen;
    for (const std::int64_t id : edits.prompt) *next++ = repeated(row[id], edits.repetition);
    for (const std::int64_t id : edits.answer) *next++ = repeated(row[id], edits.repetition);
    next = seen;
    for (const std::int64_t id : edits.prompt) row[id] = *next++;
    for (const std::int64_t id : edits.answer) row[id] = *next++;
}

}  // namespace

void require_ids(const RowEdits& edits, std::int64_t vocab) {
    require(edits.banned, vocab);
    require(edits.biased, vocab);
    require(edits.prompt, vocab);
    require(edits.answer, vocab);
    if (edits.prompt.size() + edits.answer.size() > 2 * static_cast<std::size_t>(vocab)) {
        throw std::out_of_range("the ids of a prompt and of an answer must be distinct");
    }
}

void apply(const RowEdits& edits, std::int64_t vocab, float* row, float* seen) {
    if (edits.mask) apply_mask(edits.mask, vocab, row);
    for (const std::int64_t id : edits.banned) row[id] = minus_infinity;
    for (std::size_t i = 0; i < edits.biased.size(); ++i) row[edits.biased[i]] += edits.biases[i];
    if (edits.repetition != 1.0f) penalise_repetition(edits, row, seen);
    if (edits.presence == 0.0f && edits.frequency == 0.0f) return;
    for (std::size_t i = 0; i < edits.answer.size(); ++i) {
        row[edits.answer[i]] -= edits.counts[i] * edits.frequency + edits.presence;
    }
}

}  // namespace penstock
