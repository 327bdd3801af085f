// See route.h. A few hundred numbers a token: plain C++.
#include "route.h"

#include <algorithm>
#include <cmath>

namespace penstock {

void choose_experts(const float* logits, int num_experts, int top_k, bool renormalize, std::int32_t* experts,
                    float* weights) {
    const float highest = *std::max_element(logits, logits + num_experts);
    float total = 0.0f;
    for (int e = 0; e < num_experts; ++e) total += std::exp(logits[e] - highest);
    float chosen = 0.0f;
    for (int k = 0; k < top_k; ++k) {
        int best = -1;
        for (int e = 0; e < num_experts; ++e) {
            const bool is_taken = std::find(experts, experts + k, e) != experts + k;
            if (!is_taken && (best < 0 || logits[e] > logits[best])) best = e;
        }
        experts[k] = best;
        weights[k] = std::exp(logits[best] - highest) / total;
        chosen += weights[k];
    }
    for (int k = 0; renormalize && k < top_k; ++k) weights[k] /= chosen;
}

void sort_slots(const std::int32_t* experts, std::int64_t num_slots, int num_experts,
                std::int32_t* first_slots, std::int32_t* slots, std::int32_t* sources) {
    std::fill_n(first_slots, num_experts + 1, 0);
    for (std::int64_t i = 0; i < num_slots; ++i) ++first_slots[experts[i] + 1];
    for (int e = 0; e < num_experts; ++e) first_slots[e + 1] += first_slots[e];
    for (std::int64_t i = 0; i < num_slots; ++i) {
        slots[i] = first_slots[experts[i]]++;
        sources[slots[i]] = static_cast<std::int32_t>(i);
    }
    for (int e = num_experts; e > 0; --e) first_slots[e] = first_slots[e - 1];  // they were used as cursors
    first_slots[0] = 0;
}

}  // namespace penstock
