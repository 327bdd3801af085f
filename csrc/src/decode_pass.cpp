// See penstock/decode_pass.h.
#include "penstock/decode_pass.h"

#include <array>
#include <chrono>
#include <limits>
#include <utility>

namespace penstock {

namespace {

constexpr std::uint64_t golden_gamma = 0x9E3779B97F4A7C15;

// **Source:** Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators (2014), section 4.
std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
}

}  // namespace

void number_draws(const PreparedDraws& draws, std::span<const std::int64_t> output_idxs) {
    if (!draws.starts) return;
    for (std::size_t r = 0; r < output_idxs.size(); ++r) {
        const std::uint64_t counter = static_cast<std::uint64_t>(output_idxs[r]) + 1;
        const std::uint64_t bits = mix(draws.starts[r] + counter * golden_gamma);
        draws.uniforms[r] = static_cast<double>(bits >> 11) * 0x1p-53;
    }
}

DecodePass::DecodePass(Memory memory)
    : memory_(std::move(memory)), are_finite_(static_cast<std::size_t>(memory_.num_rows), 1) {}

void DecodePass::run(Program& layers, Program& head, std::span<const AdapterRows> adapters,
                     const PreparedDraws* draws) {
    using Clock = std::chrono::steady_clock;
    const std::array<Program::External, 3> of_layers{memory_.token_ids, memory_.positions, memory_.hidden};
    const std::array<Program::External, 2> of_head{memory_.hidden, memory_.logits};
    const std::int64_t stride = maxima_stride_of(memory_.logits_cols);
    if (maxima_.empty() && head.gives_maxima()) {
        const std::int64_t size = memory_.num_rows * stride;
        maxima_.assign(static_cast<std::size_t>(size), -std::numeric_limits<float>::infinity());
    }
    float* maxima = maxima_.empty() ? nullptr : maxima_.data();
    const auto began = Clock::now();
    layers.run(memory_.num_rows, of_layers, memory_.groups, adapters);
    head.run(memory_.num_rows, of_head, {}, {}, {maxima, stride});
    program_seconds_ = std::chrono::duration<double>(Clock::now() - began).count();
    rows_are_finite(layers.pool(), layers.isa(), memory_.hidden.data, memory_.hidden_dtype == DType::bf16,
                    memory_.num_rows, memory_.hidden_cols, memory_.hidden.row_bytes, are_finite_.data());
    if (!draws) return;
    SampleCall call = draws->call;
    call.logits = reinterpret_cast<const float*>(memory_.logits.data);
    call.row_stride = memory_.logits_cols;
    call.maxima = maxima;
    call.maxima_stride = stride;
    draws->sampler->sample(call);
}

}  // namespace penstock
