// Which experts a token goes to, and the order of all slots. Private to this folder.
#pragma once

#include <cstdint>

namespace penstock {

// Choose by router logits.
//
// Softmax over all experts, then the `top_k` likeliest, best first; among equals the lowest id.
void choose_experts(const float* logits, int num_experts, int top_k, bool renormalize, std::int32_t* experts,
                    float* weights);

// Order the slots by expert, keeping the order of tokens inside an expert.
//
// Args:
//   experts: [num_slots], by token and rank.
//   first_slots: [num_experts + 1], written: where each expert's slots begin.
//   slots: [num_slots], written: the slot of each (token, rank).
//   sources: [num_slots], written: the (token, rank) of each slot.
void sort_slots(const std::int32_t* experts, std::int64_t num_slots, int num_experts,
                std::int32_t* first_slots, std::int32_t* slots, std::int32_t* sources);

}  // namespace penstock
