// What changes a row's logits before the choice. Private to this folder.
#pragma once

#include <cstdint>

#include "penstock/sampling.h"

namespace penstock {

// Throws std::out_of_range where an id is outside the vocabulary.
void require_ids(const RowEdits& edits, std::int64_t vocab);

// Change the row in place: mask, bans, biases, repetition, then frequency and presence. Keeps penalised
// logits in `seen`, which holds as many as there are ids in prompt and answer.
void apply(const RowEdits& edits, std::int64_t vocab, float* row, float* seen);

}  // namespace penstock
