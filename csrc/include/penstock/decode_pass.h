// A step of decodes over memory that stays: layers, head, whether the rows are sound, and the draws, in one
// call.
//
// A pass reads all weights and leaves nothing else in the caches: whatever the caller did between two calls,
// it would do with code and data that come from memory, at some 100 microseconds a piece. So all that a step
// needs is told before the pass, and read after it.
//
// ```
// token ids, positions, tables --layers--> hidden --head--> logits --draws--> tokens
//                                             `--> which rows are finite
// ```
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "penstock/program.h"
#include "penstock/sampling.h"

namespace penstock {

// Draws that wait for their logits.
struct PreparedDraws {
    TokenSampler* sampler;
    SampleCall call;              // all but the logits; no edits
    const std::uint64_t* starts;  // [num_rows], of the streams of random numbers; null if all are greedy
    double* uniforms;             // [num_rows], what `call` reads
};

// Write the random number of token `output_idxs[r]` of each answer; see engine/sampling/uniform.py.
void number_draws(const PreparedDraws& draws, std::span<const std::int64_t> output_idxs);

class DecodePass {
public:
    // What the caller keeps alive, and writes to between runs: an external of the programs each, but for
    // `groups`.
    struct Memory {
        std::int64_t num_rows;
        Program::External token_ids, positions;
        Program::External hidden;  // written
        DType hidden_dtype;        // bf16 or f32
        std::int64_t hidden_cols;
        Program::External logits;  // float32, written
        std::int64_t logits_cols;
        std::vector<AttentionInputs> groups;
    };

    explicit DecodePass(Memory memory);

    // Args:
    //   draws: what is drawn from the logits, row by row of `SampleCall::rows`; null draws nothing.
    void run(Program& layers, Program& head, std::span<const AdapterRows> adapters,
             const PreparedDraws* draws);

    // By row, whether the last run's hidden values were finite numbers.
    const std::vector<std::uint8_t>& are_finite() const { return are_finite_; }
    // Of the last run, inside the two programs.
    double program_seconds() const { return program_seconds_; }

private:
    Memory memory_;
    std::vector<std::uint8_t> are_finite_;
    std::vector<float> maxima_;  // of the logits, by row; empty where the head gives none
    double program_seconds_ = 0.0;
};

}  // namespace penstock
