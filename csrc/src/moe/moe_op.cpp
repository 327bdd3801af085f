// The stages of penstock/moe.h, distributed over the threads. All their memory is the program's shared
// memory.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "penstock/linear.h"
#include "penstock/moe.h"
#include "route.h"

namespace penstock {

namespace {

// Tokens that are worked on together: bounds the memory of a long prefill; with 128 experts of which 8 are
// taken an expert still has 64 rows, enough to be bound by the multipliers.
constexpr std::int64_t most_tokens = 1024;
// Tokens whose router logits are one task.
constexpr int routed_tokens = 32;
// Slots that are gathered, or quantized, in one task.
constexpr std::int64_t gathered_slots = 8;
// Rows of a tile of sums, as in linear_op.cpp: a multiple of every kernel's `rows_at_once`.
constexpr int tile_rows = 96;

struct alignas(64) Tile {
    float values[tile_rows * panel_features];
};

void require(bool holds, const std::string& otherwise) {
    if (!holds) throw std::invalid_argument(otherwise);
}

std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

int num_panels(std::int64_t features) {
    return static_cast<int>((features + panel_features - 1) / panel_features);
}

// The sizes of a layer, and where its arrays lie in the shared memory.
struct Layout {
    std::int64_t hidden, inner, num_experts, top_k;
    std::int64_t hidden_inputs, inner_inputs;  // padded to what the linear kernels read
    std::int64_t hidden_features;              // padded to whole panels
    std::int64_t router_features;

    std::int64_t logits, experts, weights, first_slots, active, slots, sources, rows, row_scales, row_sums,
        inner_rows, inner_values, inner_scales, inner_sums, results, num_bytes;

    explicit Layout(const MoeArgs& args)
        : hidden(args.x.cols),
          inner(args.experts[0].gate->out_features),
          num_experts(static_cast<std::int64_t>(args.experts.size())),
          top_k(args.top_k),
          hidden_inputs(round_up(hidden, input_alignment)),
          inner_inputs(round_up(inner, input_alignment)),
          hidden_features(round_up(hidden, panel_features)),
          router_features(round_up(num_experts, panel_features)) {
        const std::int64_t num_slots = most_tokens * top_k;
        const std::int64_t item = args.is_quantized ? 1 : 2;
        std::int64_t at = 0;
        const auto take = [&](std::int64_t bytes) {
            const std::int64_t start = at;
            at += round_up(bytes, static_cast<std::int64_t>(cache_line));
            return start;
        };
        logits = take(4 * router_features * most_tokens);
        experts = take(4 * num_slots);
        weights = take(4 * num_slots);
        first_slots = take(4 * (num_experts + 1));
        active = take(4 * (num_experts + 1));
        slots = take(4 * num_slots);
        sources = take(4 * num_slots);
        rows = take(item * hidden_inputs * num_slots);
        row_scales = take(4 * num_slots);
        row_sums = take(4 * hidden_inputs / sum_group * num_slots);
        inner_rows = take(2 * inner_inputs * num_slots);
        inner_values = take(args.is_quantized ? inner_inputs * num_slots : 0);
        inner_scales = take(4 * num_slots);
        inner_sums = take(4 * inner_inputs / sum_group * num_slots);
        results = take(4 * hidden_features * num_slots);
        num_bytes = at;
    }
};

Multiply multiply_of(const LinearKernels& kernels, WeightFormat format, bool is_quantized) {
    switch (format) {
        case WeightFormat::bf16: return kernels.bf16;
        case WeightFormat::int8: return is_quantized ? kernels.int8 : kernels.int8_weight_only;
        case WeightFormat::int4: return is_quantized ? kernels.int4 : kernels.int4_weight_only;
    }
    return nullptr;
}

class MoeOp final : public Op {
public:
    MoeOp(Program& program, const MoeArgs& args)
        : args_(args),
          at_(args),
          dense_(dense_kernels(program.isa())),
          linear_(linear_kernels(program.isa())),
          router_(
              pack({args.router, DType::bf16, at_.hidden, 1, static_cast<int>(at_.num_experts), args.x.cols},
                   WeightFormat::bf16, 0, program.pool())) {
        program.reserve_shared(static_cast<std::size_t>(at_.num_bytes));
    }

    std::string_view name() const override { return "moe"; }

    std::size_t scratch_bytes(const Step&) const override {
        return sizeof(float) * static_cast<std::size_t>(std::max(at_.hidden_inputs, at_.inner_inputs));
    }

    void run(const Step& step, Worker& worker) const override {
        for (std::int64_t first = 0; first < step.num_rows; first += most_tokens) {
            if (first > 0) worker.barrier();
            run_tokens({step, first, std::min(most_tokens, step.num_rows - first)}, worker);
        }
    }

private:
    // Some tokens of the step.
    struct Tokens {
        const Step& step;
        std::int64_t first;
        std::int64_t count;

        template <class T>
        T* shared(std::int64_t offset) const {
            return reinterpret_cast<T*>(step.shared + offset);
        }
    };

    void run_tokens(const Tokens& tokens, Worker& worker) const {
        const std::int64_t num_slots = tokens.count * at_.top_k;
        const std::int64_t num_blocks = (tokens.count + routed_tokens - 1) / routed_tokens;
        worker.share(num_blocks * router_->num_panels, [&](std::int64_t i) {
            route(tokens, i / router_->num_panels, static_cast<int>(i % router_->num_panels));
        });
        worker.barrier();
        worker.share(num_blocks, [&](std::int64_t i) { choose(tokens, i); });
        worker.barrier();
        worker.share(1, [&](std::int64_t) { sort(tokens, num_slots); });
        worker.barrier();
        share_slots(num_slots, worker, [&](std::int64_t slot) { gather(tokens, slot, worker); });
        worker.barrier();
        share_panels(tokens, at_.inner, worker,
                     [&](std::int64_t expert, int panel) { up(tokens, expert, panel); });
        worker.barrier();
        if (args_.is_quantized) {
            share_slots(num_slots, worker, [&](std::int64_t slot) { quantize_inner(tokens, slot, worker); });
            worker.barrier();
        }
        share_panels(tokens, at_.hidden, worker,
                     [&](std::int64_t expert, int panel) { down(tokens, expert, panel); });
        worker.barrier();
        worker.share(tokens.count, [&](std::int64_t token) { sum(tokens, token, worker); });
    }

    template <class Task>
    void share_slots(std::int64_t num_slots, Worker& worker, Task task) const {
        worker.share((num_slots + gathered_slots - 1) / gathered_slots, [&](std::int64_t i) {
            const std::int64_t end = std::min(num_slots, (i + 1) * gathered_slots);
            for (std::int64_t slot = i * gathered_slots; slot < end; ++slot) task(slot);
        });
    }

    // A task for each panel of each expert that has rows, in the order in which the weights lie in memory.
    template <class Task>
    void share_panels(const Tokens& tokens, std::int64_t features, Worker& worker, Task task) const {
        const auto* active = tokens.shared<const std::int32_t>(at_.active);
        const int panels = num_panels(features);
        worker.share(active[0] * std::int64_t{panels}, [&](std::int64_t i) {
            task(active[1 + i / panels], static_cast<int>(i % panels));
        });
    }

    // The expert's rows, at most `tile_rows` at a time: task(first slot, rows).
    template <class Task>
    void for_each_tile(const Tokens& tokens, std::int64_t expert, Task task) const {
        const auto* first_slots = tokens.shared<const std::int32_t>(at_.first_slots);
        for (std::int64_t slot = first_slots[expert]; slot < first_slots[expert + 1]; slot += tile_rows) {
            task(slot, static_cast<int>(std::min<std::int64_t>(tile_rows, first_slots[expert + 1] - slot)));
        }
    }

    // One panel of some tokens' router logits.
    void route(const Tokens& tokens, std::int64_t block, int panel) const {
        const std::int64_t start = block * routed_tokens;
        const int count = static_cast<int>(std::min<std::int64_t>(routed_tokens, tokens.count - start));
        const Rows x = tokens.step.at(args_.x);
        Tile tile;
        linear_.bf16({x.data, x.row_bytes}, tokens.first + start, count, *router_, panel, tile.values);
        for (int r = 0; r < count; ++r) {
            float* logits = tokens.shared<float>(at_.logits) + (start + r) * at_.router_features;
            std::copy_n(tile.values + r * panel_features, panel_features, logits + panel * panel_features);
        }
    }

    void choose(const Tokens& tokens, std::int64_t block) const {
        const std::int64_t end = std::min(tokens.count, (block + 1) * routed_tokens);
        for (std::int64_t token = block * routed_tokens; token < end; ++token) {
            choose_experts(tokens.shared<float>(at_.logits) + token * at_.router_features,
                           static_cast<int>(at_.num_experts), args_.top_k, args_.renormalize,
                           tokens.shared<std::int32_t>(at_.experts) + token * at_.top_k,
                           tokens.shared<float>(at_.weights) + token * at_.top_k);
        }
    }

    // The slots, and the experts that have any: their number, then they.
    void sort(const Tokens& tokens, std::int64_t num_slots) const {
        auto* first_slots = tokens.shared<std::int32_t>(at_.first_slots);
        sort_slots(tokens.shared<std::int32_t>(at_.experts), num_slots, static_cast<int>(at_.num_experts),
                   first_slots, tokens.shared<std::int32_t>(at_.slots),
                   tokens.shared<std::int32_t>(at_.sources));
        auto* active = tokens.shared<std::int32_t>(at_.active);
        active[0] = 0;
        for (std::int32_t expert = 0; expert < at_.num_experts; ++expert) {
            if (first_slots[expert + 1] > first_slots[expert]) active[1 + active[0]++] = expert;
        }
    }

    // int8 values, scale and sums of the row in `from`, whose padding is zero.
    void quantize(const Tokens& tokens, const float* from, std::int64_t n, std::int64_t inputs,
                  std::int64_t slot, std::int64_t values_at, std::int64_t scales_at,
                  std::int64_t sums_at) const {
        auto* values = tokens.shared<std::int8_t>(values_at) + slot * inputs;
        std::memset(values + n, 0, static_cast<std::size_t>(inputs - n));
        auto* sums = tokens.shared<std::int32_t>(sums_at) + slot * inputs / sum_group;
        tokens.shared<float>(scales_at)[slot] = dense_.quantize(from, static_cast<int>(n), values, sums);
    }

    // This thread's row of float32, as long as the longer of the two kinds of rows.
    static float* scratch_row(Worker& worker) { return reinterpret_cast<float*>(worker.scratch()); }

    void gather(const Tokens& tokens, std::int64_t slot, Worker& worker) const {
        const std::int64_t token = tokens.shared<std::int32_t>(at_.sources)[slot] / at_.top_k;
        const auto* x = tokens.step.at(args_.x).row<const std::uint16_t>(tokens.first + token);
        if (args_.is_quantized) {
            float* row = scratch_row(worker);
            dense_.load_bf16(x, static_cast<int>(at_.hidden), row);
            quantize(tokens, row, at_.hidden, at_.hidden_inputs, slot, at_.rows, at_.row_scales,
                     at_.row_sums);
            return;
        }
        auto* row = tokens.shared<std::uint16_t>(at_.rows) + slot * at_.hidden_inputs;
        std::memcpy(row, x, 2 * static_cast<std::size_t>(at_.hidden));
        std::memset(row + at_.hidden, 0, 2 * static_cast<std::size_t>(at_.hidden_inputs - at_.hidden));
    }

    void quantize_inner(const Tokens& tokens, std::int64_t slot, Worker& worker) const {
        float* row = scratch_row(worker);
        dense_.load_bf16(tokens.shared<std::uint16_t>(at_.inner_rows) + slot * at_.inner_inputs,
                         static_cast<int>(at_.inner), row);
        quantize(tokens, row, at_.inner, at_.inner_inputs, slot, at_.inner_values, at_.inner_scales,
                 at_.inner_sums);
    }

    Operand operand(const Tokens& tokens, std::int64_t inputs, std::int64_t rows, std::int64_t scales,
                    std::int64_t sums) const {
        if (!args_.is_quantized) return {tokens.shared<std::byte>(rows), 2 * inputs};
        return {tokens.shared<std::byte>(rows),   inputs, tokens.shared<std::byte>(scales), 4,
                tokens.shared<std::byte>(sums), 4 * inputs / sum_group};
    }

    void multiply(const Operand& x, std::int64_t slot, int num_rows, const Matrix& matrix, int panel,
                  Tile& tile) const {
        multiply_of(linear_, matrix.format, args_.is_quantized)(x, slot, num_rows, matrix, panel,
                                                                tile.values);
    }

    void up(const Tokens& tokens, std::int64_t expert, int panel) const {
        const Expert& weights = args_.experts[static_cast<std::size_t>(expert)];
        const Operand x = operand(tokens, at_.hidden_inputs, at_.rows, at_.row_scales, at_.row_sums);
        // The last panel writes the row's padding as well: features that are not there are 0.
        const std::int64_t first_col = panel * panel_features;
        const bool is_last = first_col + panel_features >= at_.inner;
        for_each_tile(tokens, expert, [&](std::int64_t slot, int num_rows) {
            Tile gate, up;
            multiply(x, slot, num_rows, *weights.gate, panel, gate);
            multiply(x, slot, num_rows, *weights.up, panel, up);
            dense_.activate(gate.values, num_rows * panel_features, args_.activation);
            dense_.multiply(gate.values, num_rows * panel_features, up.values);
            for (int r = 0; r < num_rows; ++r) {
                auto* row = tokens.shared<std::uint16_t>(at_.inner_rows) + (slot + r) * at_.inner_inputs;
                dense_.store_bf16(gate.values + r * panel_features, panel_features, row + first_col);
                const std::int64_t end = first_col + panel_features;
                if (is_last) std::memset(row + end, 0, 2 * static_cast<std::size_t>(at_.inner_inputs - end));
            }
        });
    }

    void down(const Tokens& tokens, std::int64_t expert, int panel) const {
        const Expert& weights = args_.experts[static_cast<std::size_t>(expert)];
        const Operand x =
            operand(tokens, at_.inner_inputs, args_.is_quantized ? at_.inner_values : at_.inner_rows,
                    at_.inner_scales, at_.inner_sums);
        for_each_tile(tokens, expert, [&](std::int64_t slot, int num_rows) {
            Tile tile;
            multiply(x, slot, num_rows, *weights.down, panel, tile);
            for (int r = 0; r < num_rows; ++r) {
                float* row = tokens.shared<float>(at_.results) + (slot + r) * at_.hidden_features;
                std::copy_n(tile.values + r * panel_features, panel_features, row + panel * panel_features);
            }
        });
    }

    void sum(const Tokens& tokens, std::int64_t token, Worker& worker) const {
        const int n = static_cast<int>(at_.hidden);
        float* row = scratch_row(worker);
        std::fill_n(row, at_.hidden_inputs, 0.0f);
        for (std::int64_t i = token * at_.top_k; i < (token + 1) * at_.top_k; ++i) {
            const std::int64_t slot = tokens.shared<std::int32_t>(at_.slots)[i];
            dense_.add_scaled(tokens.shared<float>(at_.results) + slot * at_.hidden_features, n,
                              tokens.shared<float>(at_.weights)[i], row);
        }
        const Rows out = tokens.step.at(args_.out);
        if (out.dtype == DType::bf16) {
            auto* to = out.row<std::uint16_t>(tokens.first + token);
            if (args_.add) dense_.add_bf16(to, n, row);
            dense_.store_bf16(row, n, to);
        } else {
            auto* to = out.row<float>(tokens.first + token);
            if (args_.add) dense_.add_f32(to, n, row);
            dense_.store_f32(row, n, to);
        }
    }

    const MoeArgs args_;
    const Layout at_;
    const DenseKernels& dense_;
    const LinearKernels& linear_;
    const std::shared_ptr<Matrix> router_;
};

void require_matrix(const Matrix& matrix, std::int64_t out_features, std::int64_t in_features, Isa isa,
                    bool is_quantized) {
    require(multiply_of(linear_kernels(isa), matrix.format, is_quantized),
            std::string(isa_name(isa)) + " has no kernel for the experts' format");
    require(matrix.out_features == out_features && matrix.in_features == in_features,
            "all experts must have the shapes of the first");
    require(!is_quantized || matrix.format != WeightFormat::bf16,
            "bf16 experts take bf16 rows, not quantized ones");
}

}  // namespace

void add_moe(Program& program, const MoeArgs& args) {
    require(!args.experts.empty(), "a mixture needs experts");
    require(args.x.dtype == DType::bf16, "x must be bf16");
    require(program.is_padded(args.x), "rows whose length is no multiple of 64 need a padded buffer");
    require(args.out.dtype == DType::bf16 || args.out.dtype == DType::f32, "out must be bf16 or f32");
    require(args.out.cols == args.x.cols, "out must be as wide as x");
    require(args.top_k >= 1 && args.top_k <= static_cast<int>(args.experts.size()),
            "top_k must be 1 to the experts' number");
    const int inner = args.experts[0].gate->out_features;
    for (const Expert& expert : args.experts) {
        require_matrix(*expert.gate, inner, args.x.cols, program.isa(), args.is_quantized);
        require_matrix(*expert.up, inner, args.x.cols, program.isa(), args.is_quantized);
        require_matrix(*expert.down, args.x.cols, inner, program.isa(), args.is_quantized);
    }
    program.add(std::make_unique<MoeOp>(program, args));
}

}  // namespace penstock
