// The driver of the linear operations: cuts the work into tasks, calls the multiply kernel and finishes its
// results.
//
// ```
// few rows    the weights are read once, in memory order; a task is a run of panels, the runs get shorter towards the end
//             so that threads end together
// many rows   rows are cut into blocks whose operand stays in the L2 cache; a task is one panel and one row block,
//             all panels of a block before the next block
// long rows   blocks get small, and each reads all weights. Where the kernel can do a part of K, a task is a group of panels
//             for 512 rows: part by part, so that the part's operand and the sums stay in the L2 cache
// a task      for each 96 rows: multiply into a tile on the stack, finish the tile (bias, gate, residual, store)
// ```
#include "penstock/linear_op.h"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "epilogue.h"

namespace penstock {

namespace {

// Rows of a tile of sums: 12 KiB, a quarter of the L1 cache, a multiple of every kernel's `rows_at_once`.
constexpr int tile_rows = 96;

struct alignas(64) Tile {
    float values[tile_rows * panel_features];
};

// The parts of K of long rows: 512 KiB of operand and at most 1 MiB of sums fit beside a stream of weights
// into the 2 MiB of L2 that every core with tiles has. Of the machine's bandwidth each step of a part then
// takes 2 bytes a cycle for the weights and as many for the operand (which is read once for each group of
// panels), where blocks of rows took up to 10.
constexpr int part_rows = 512, part_row_bytes = 1024, most_group_panels = 16;
constexpr int blocks_for_parts = 3;  // and of at most half of part_rows: else parts would read the weights as often
constexpr int groups_per_thread = 2;

// A panel of one of an operation's outputs.
struct PanelRef {
    int projection;
    int panel;
};

// Tasks per thread at which one task's length hardly matters to when the last thread ends.
constexpr int tasks_per_thread = 4;

void add_panel(const Matrix& matrix, int panel, std::vector<Memory>& reads) {
    const auto i = static_cast<std::size_t>(panel),
               scales = matrix.scales.size() / static_cast<std::size_t>(matrix.num_panels);
    if (scales > 0) reads.push_back({matrix.scales.data() + i * scales, scales});
    reads.push_back({matrix.values.data() + i * matrix.panel_bytes(), matrix.panel_bytes()});
}

struct RowBlocks {
    int size;
    std::int64_t count;
};

std::int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const std::int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (bytes > 0) return bytes;
#endif
    return std::int64_t{1} << 20;  // what current cores have at least
}

std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// Blocks of equal size whose operand fills at most three quarters of the L2 cache (the panels pass through
// the rest), and enough of them that every thread has tasks.
RowBlocks row_blocks(std::int64_t num_rows, std::int64_t row_bytes, std::int64_t num_panels, int rows_at_once,
                     int threads) {
    const std::int64_t steps = std::max<std::int64_t>(1, l2_bytes() * 3 / 4 / (row_bytes * rows_at_once));
    const std::int64_t fitting = steps * rows_at_once;
    std::int64_t count = (num_rows + fitting - 1) / fitting;
    const std::int64_t wanted = (std::int64_t{tasks_per_thread} * threads + num_panels - 1) / num_panels;
    count = std::max(count, std::min(wanted, num_rows / rows_at_once));
    const std::int64_t size = round_up((num_rows + count - 1) / count, rows_at_once);
    return {static_cast<int>(size), (num_rows + size - 1) / size};
}

// The runs of panels of a single row block: starts of the tasks, and the end. Each run is a share of what is
// left.
std::vector<int> panel_runs(int num_panels, int threads) {
    std::vector<int> starts{0};
    while (starts.back() < num_panels) {
        const int left = num_panels - starts.back();
        starts.push_back(starts.back() + std::max(1, left / (2 * threads)));
    }
    return starts;
}

std::shared_ptr<const std::vector<float>> copy_of(const float* bias, const Matrix& matrix) {
    if (!bias) return nullptr;
    auto copy = std::make_shared<std::vector<float>>(bias, bias + matrix.out_features);
    copy->resize(static_cast<std::size_t>(matrix.num_panels) * panel_features);
    return copy;
}

// A matrix with its bias, padded to whole panels.
struct BoundProjection {
    std::shared_ptr<const Matrix> matrix;
    std::shared_ptr<const std::vector<float>> bias;

    explicit BoundProjection(const Projection& from)
        : matrix(from.matrix), bias(copy_of(from.bias, *from.matrix)) {}

    const float* panel_bias(int panel) const {
        return bias ? bias->data() + panel * panel_features : nullptr;
    }
    int cols(int panel) const {
        return std::min(panel_features, matrix->out_features - panel * panel_features);
    }
};

const EpilogueKernels& epilogue_of(Isa isa) {
    if (isa == Isa::scalar) return epilogue_scalar;
    return isa == Isa::avx2 ? epilogue_avx2 : epilogue_avx512;
}

void require(bool holds, const std::string& otherwise) {
    if (!holds) throw std::invalid_argument(otherwise);
}

Multiply multiply_of(const Program& program, const LinearInput& x, const Matrix& matrix) {
    const LinearKernels& kernels = linear_kernels(program.isa());
    const bool is_quantized = std::holds_alternative<QuantizedRef>(x);
    switch (matrix.format) {
        case WeightFormat::bf16: return kernels.bf16;
        case WeightFormat::int8: return is_quantized ? kernels.int8 : kernels.int8_weight_only;
        case WeightFormat::int4: return is_quantized ? kernels.int4 : kernels.int4_weight_only;
    }
    return nullptr;
}

// Null where there is none.
MultiplyPart multiply_part_of(const Program& program, const LinearInput& x, const Matrix& matrix) {
    const LinearKernels& kernels = linear_kernels(program.isa());
    if (matrix.format == WeightFormat::bf16) return kernels.bf16_part;
    const bool is_quantized = std::holds_alternative<QuantizedRef>(x);
    return is_quantized && matrix.format == WeightFormat::int8 ? kernels.int8_part : nullptr;
}

int input_cols(const Program& program, const LinearInput& x) {
    if (const auto* quantized = std::get_if<QuantizedRef>(&x)) {
        const Ref& values = quantized->values;
        require(values.dtype == DType::i8 && quantized->scales.dtype == DType::f32 &&
                    quantized->sums.dtype == DType::i32,
                "quantized rows are i8 values, f32 scales and i32 sums");
        require(quantized->sums.cols >= round_up(values.cols, input_alignment) / sum_group,
                "quantized rows need a sum for every 32 values, padding included");
        require(program.is_padded(values),
                "int8 rows whose length is no multiple of 64 need a padded buffer");
        return values.cols;
    }
    const Ref& rows = std::get<Ref>(x);
    require(rows.dtype == DType::bf16, "rows are bf16 or quantized");
    require(program.is_padded(rows), "bf16 rows whose length is no multiple of 64 need a padded buffer");
    return rows.cols;
}

void check(const Program& program, const LinearInput& x, const Matrix& matrix, const Ref& out) {
    const int cols = input_cols(program, x);
    require(cols == matrix.in_features, "rows have " + std::to_string(cols) + " values, the matrix takes " +
                                            std::to_string(matrix.in_features));
    require(out.cols == matrix.out_features, "the output has " + std::to_string(out.cols) +
                                                 " columns, the matrix gives " +
                                                 std::to_string(matrix.out_features));
    require(out.dtype == DType::bf16 || out.dtype == DType::f32, "the output is bf16 or f32");
    require(std::holds_alternative<Ref>(x) || matrix.format != WeightFormat::bf16,
            "bf16 matrices take bf16 rows, not quantized ones");
    require(multiply_of(program, x, matrix) != nullptr,
            "there is no kernel for these rows and this weight format");
}

Operand operand_of(const Step& step, const LinearInput& x) {
    if (const auto* quantized = std::get_if<QuantizedRef>(&x)) {
        const Rows values = step.at(quantized->values), scales = step.at(quantized->scales);
        const Rows sums = step.at(quantized->sums);
        return {values.data, values.row_bytes, scales.data, scales.row_bytes, sums.data, sums.row_bytes};
    }
    const Rows rows = step.at(std::get<Ref>(x));
    return {rows.data, rows.row_bytes};
}

// What all linear operations share: the distribution of panels and rows over the threads.
class PanelOp : public Op {
public:
    PanelOp(const Program& program, LinearInput x)
        : x_(std::move(x)),
          epilogue_(epilogue_of(program.isa())),
          rows_at_once_(linear_kernels(program.isa()).rows_at_once),
          threads_(program.pool().num_threads()) {}

    void run(const Step& step, Worker& worker) const final {
        const Operand x = operand_of(step, x_);
        const auto num_panels = static_cast<std::int64_t>(panels_.size());
        const RowBlocks blocks = blocks_of(step, x);
        if (blocks.count == 1) {
            worker.share(static_cast<std::int64_t>(runs_.size()) - 1, [&](std::int64_t task) {
                const auto i = static_cast<std::size_t>(task);
                for (int at = runs_[i]; at < runs_[i + 1]; ++at) run_panel(step, x, at, 0, step.num_rows);
            });
            return;
        }
        if (runs_parts(blocks)) return run_parts(step, x, worker);
        worker.share(blocks.count * num_panels, [&](std::int64_t task) {
            const std::int64_t first = task / num_panels * blocks.size;
            run_panel(step, x, static_cast<int>(task % num_panels), first,
                      std::min<std::int64_t>(step.num_rows, first + blocks.size));
        });
    }

    // 1 MiB a thread, kept from the first such step on.
    std::size_t scratch_bytes(const Step& step) const final {
        constexpr std::size_t sums = sizeof(float) * panel_features * part_rows * most_group_panels;
        return runs_parts(blocks_of(step, operand_of(step, x_))) ? sums : 0;
    }

    std::vector<Memory> reads(int task) const final {
        std::vector<Memory> reads;
        const auto i = static_cast<std::size_t>(task);
        if (i + 1 >= runs_.size()) return reads;
        for (int at = runs_[i]; at < runs_[i + 1]; ++at)
            add_reads(panels_[static_cast<std::size_t>(at)], reads);
        return reads;
    }

protected:
    // What `run_tile` reads of the weights.
    virtual void add_reads(const PanelRef& at, std::vector<Memory>& reads) const = 0;

    // The panel's results for at most `tile_rows` rows.
    virtual void run_tile(const Step& step, const Operand& x, const PanelRef& at, std::int64_t first_row,
                          int num_rows) const = 0;

    // Whether the panels' kernels can do a part of K; then `multiply_part` and `finish` are there.
    virtual bool has_parts() const { return false; }
    virtual void multiply_part(const Operand&, const PanelRef&, std::int64_t, int, const InputRange&,
                               float*) const {}
    virtual void finish(const Step&, const PanelRef&, std::int64_t, int, const float*) const {}

    void add_panels(int projection, int num_panels) {
        for (int panel = 0; panel < num_panels; ++panel) panels_.push_back({projection, panel});
        runs_ = panel_runs(static_cast<int>(panels_.size()), threads_);
    }

    const LinearInput x_;
    const EpilogueKernels& epilogue_;

private:
    RowBlocks blocks_of(const Step& step, const Operand& x) const {
        const auto num_panels = static_cast<std::int64_t>(panels_.size());
        return row_blocks(step.num_rows, x.row_bytes, num_panels, rows_at_once_, threads_);
    }

    bool runs_parts(const RowBlocks& blocks) const {
        return blocks.count >= blocks_for_parts && blocks.size <= part_rows / 2 && has_parts();
    }

    void run_panel(const Step& step, const Operand& x, int at, std::int64_t first, std::int64_t end) const {
        for (; first < end; first += tile_rows) {
            const int num_rows = static_cast<int>(std::min<std::int64_t>(tile_rows, end - first));
            run_tile(step, x, panels_[static_cast<std::size_t>(at)], first, num_rows);
        }
    }

    void run_parts(const Step& step, const Operand& x, Worker& worker) const {
        const auto num_panels = static_cast<int>(panels_.size());
        const int wanted = (num_panels + groups_per_thread * threads_ - 1) / (groups_per_thread * threads_);
        const int group = std::min(most_group_panels, wanted);
        const int num_groups = (num_panels + group - 1) / group;
        const std::int64_t num_blocks = (step.num_rows + part_rows - 1) / part_rows;
        auto* sums = reinterpret_cast<float*>(worker.scratch());
        worker.share(num_blocks * num_groups, [&](std::int64_t task) {
            const std::int64_t first = task / num_groups * part_rows;
            const int first_panel = static_cast<int>(task % num_groups) * group;
            const PanelGroup of{first_panel, std::min(num_panels, first_panel + group), first,
                                static_cast<int>(std::min<std::int64_t>(part_rows, step.num_rows - first))};
            run_group(step, x, of, sums);
        });
    }

    struct PanelGroup {
        int first;
        int end;
        std::int64_t first_row;
        int num_rows;
    };

    // sums: [panels][rows][32].
    void run_group(const Step& step, const Operand& x, const PanelGroup& group, float* sums) const {
        const int part_inputs = part_row_bytes / bytes_of_input();
        const auto for_tiles = [&](auto&& function) {
            for (int at = group.first; at < group.end; ++at) {
                for (int row = 0; row < group.num_rows; row += tile_rows) {
                    function(panels_[static_cast<std::size_t>(at)], group.first_row + row,
                             std::min(tile_rows, group.num_rows - row),
                             sums + (std::int64_t{at - group.first} * group.num_rows + row) * panel_features);
                }
            }
        };
        for (int input = 0; input < padded_inputs(); input += part_inputs) {
            const InputRange part{input, std::min(padded_inputs(), input + part_inputs)};
            for_tiles([&](const PanelRef& at, std::int64_t row, int num_rows, float* tile) {
                multiply_part(x, at, row, num_rows, part, tile);
            });
        }
        for_tiles([&](const PanelRef& at, std::int64_t row, int num_rows, float* tile) {
            finish(step, at, row, num_rows, tile);
        });
    }

    int bytes_of_input() const { return std::holds_alternative<QuantizedRef>(x_) ? 1 : 2; }
    int padded_inputs() const {
        const auto* quantized = std::get_if<QuantizedRef>(&x_);
        return static_cast<int>(
            round_up(quantized ? quantized->values.cols : std::get<Ref>(x_).cols, input_alignment));
    }

    const int rows_at_once_;
    const int threads_;
    std::vector<PanelRef> panels_;
    std::vector<int> runs_;
};

class LinearOp final : public PanelOp {
public:
    LinearOp(const Program& program, const LinearInput& x, const std::vector<Projection>& projections,
             const std::vector<Ref>& outs, bool add)
        : PanelOp(program, x), outs_(outs), finish_(add ? epilogue_.add : epilogue_.store) {
        for (const Projection& projection : projections) {
            const Matrix& matrix = *projection.matrix;
            add_panels(static_cast<int>(projections_.size()), matrix.num_panels);
            projections_.emplace_back(projection);
            multiply_.push_back(multiply_of(program, x, matrix));
            multiply_part_.push_back(multiply_part_of(program, x, matrix));
        }
    }

    std::string_view name() const override { return "linear"; }

protected:
    void run_tile(const Step& step, const Operand& x, const PanelRef& at, std::int64_t first_row,
                  int num_rows) const override {
        const auto i = static_cast<std::size_t>(at.projection);
        const BoundProjection& projection = projections_[i];
        Tile tile;
        multiply_[i](x, first_row, num_rows, *projection.matrix, at.panel, tile.values);
        finish(step, at, first_row, num_rows, tile.values);
    }

    void add_reads(const PanelRef& at, std::vector<Memory>& reads) const override {
        add_panel(*projections_[static_cast<std::size_t>(at.projection)].matrix, at.panel, reads);
    }

    void finish(const Step& step, const PanelRef& at, std::int64_t first_row, int num_rows,
                const float* sums) const override {
        const auto i = static_cast<std::size_t>(at.projection);
        const BoundProjection& projection = projections_[i];
        const Destination to{step.at(outs_[i]), first_row, num_rows, at.panel * panel_features,
                             projection.cols(at.panel)};
        finish_({sums, projection.panel_bias(at.panel)}, to);
        if (step.maxima.buffer != outs_[i].buffer) return;
        const int panel = outs_[i].col / panel_features + at.panel;
        epilogue_.maxima(to, step.maxima.data + first_row * step.maxima.row_values + panel,
                         step.maxima.row_values);
    }

    bool writes_maxima(int buffer, int cols) const override {
        int written = 0;
        for (const Ref& out : outs_) {
            if (out.buffer != buffer || out.dtype != DType::f32 || out.col % panel_features != 0) return false;
            written += out.cols;
        }
        return finish_ == epilogue_.store && written == cols;
    }

    bool has_parts() const override {
        return std::all_of(multiply_part_.begin(), multiply_part_.end(),
                           [](MultiplyPart part) { return part != nullptr; });
    }

    void multiply_part(const Operand& x, const PanelRef& at, std::int64_t first_row, int num_rows,
                       const InputRange& inputs, float* sums) const override {
        const auto i = static_cast<std::size_t>(at.projection);
        multiply_part_[i](x, first_row, num_rows, *projections_[i].matrix, at.panel, inputs, sums);
    }

private:
    std::vector<BoundProjection> projections_;
    std::vector<Multiply> multiply_;
    std::vector<MultiplyPart> multiply_part_;
    std::vector<Ref> outs_;
    void (*finish_)(const Sums&, const Destination&);
};

class GatedLinearOp final : public PanelOp {
public:
    GatedLinearOp(const Program& program, const LinearInput& x, const Projection& gate, const Projection& up,
                  Gate kind, const Ref& out)
        : PanelOp(program, x),
          gate_(gate),
          up_(up),
          multiply_gate_(multiply_of(program, x, *gate.matrix)),
          multiply_up_(multiply_of(program, x, *up.matrix)),
          kind_(kind),
          out_(out) {
        add_panels(0, gate.matrix->num_panels);
    }

    std::string_view name() const override { return "gated_linear"; }

protected:
    void run_tile(const Step& step, const Operand& x, const PanelRef& at, std::int64_t first_row,
                  int num_rows) const override {
        Tile gate, up;
        multiply_gate_(x, first_row, num_rows, *gate_.matrix, at.panel, gate.values);
        multiply_up_(x, first_row, num_rows, *up_.matrix, at.panel, up.values);
        epilogue_.gate(kind_, {gate.values, gate_.panel_bias(at.panel)},
                       {up.values, up_.panel_bias(at.panel)},
                       {step.at(out_), first_row, num_rows, at.panel * panel_features, gate_.cols(at.panel)});
    }

    void add_reads(const PanelRef& at, std::vector<Memory>& reads) const override {
        add_panel(*gate_.matrix, at.panel, reads);
        add_panel(*up_.matrix, at.panel, reads);
    }

private:
    BoundProjection gate_, up_;
    Multiply multiply_gate_, multiply_up_;
    Gate kind_;
    Ref out_;
};

}  // namespace

void add_linear(Program& program, const LinearInput& x, const std::vector<Projection>& projections,
                const std::vector<Ref>& outs, bool add) {
    require(!projections.empty() && projections.size() == outs.size(),
            "one output for each of one or more matrices");
    for (std::size_t i = 0; i < outs.size(); ++i) check(program, x, *projections[i].matrix, outs[i]);
    program.add(std::make_unique<LinearOp>(program, x, projections, outs, add));
}

void add_gated_linear(Program& program, const LinearInput& x, const Projection& gate, const Projection& up,
                      Gate kind, const Ref& out) {
    check(program, x, *gate.matrix, out);
    check(program, x, *up.matrix, out);
    program.add(std::make_unique<GatedLinearOp>(program, x, gate, up, kind, out));
}

}  // namespace penstock
