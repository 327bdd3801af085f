// The operations of dense.h: who computes which rows. The arithmetic is in kernels.inl.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"

namespace penstock {

namespace {

// A task is about this many values: 1 to 2 us of work, against some 50 ns to be handed out.
constexpr int values_per_task = 8192;
// Rows of independent values are cut into pieces of this many, so that one long row keeps all threads busy
// and the scratch stays in the L1 cache.
constexpr int piece_values = 2048;

void require(bool is_true, const char* message) {
    if (!is_true) throw std::invalid_argument(message);
}

bool is_float(const Ref& ref) { return ref.dtype == DType::bf16 || ref.dtype == DType::f32; }

int padded_cols(int cols) { return (cols + input_alignment - 1) / input_alignment * input_alignment; }

// What a piece of work is: columns [col, col + n) of a row.
struct Piece {
    std::int64_t row;
    int col;
    int n;
};

// An operation whose pieces are independent: `body(step, piece, scratch)` with scratch for `scratch_rows`
// pieces.
template <class Body>
class PieceOp final : public Op {
public:
    PieceOp(std::string_view name, int cols, int piece, int scratch_rows, Body body)
        : name_(name),
          cols_(cols),
          piece_(std::min(piece, cols)),
          scratch_rows_(scratch_rows),
          body_(std::move(body)) {}

    std::string_view name() const override { return name_; }

    void run(const Step& step, Worker& worker) const override {
        const std::int64_t pieces_per_row = (cols_ + piece_ - 1) / piece_;
        const std::int64_t num_pieces = step.num_rows * pieces_per_row;
        const std::int64_t per_task = std::max(1, values_per_task / piece_);
        const std::int64_t num_tasks = (num_pieces + per_task - 1) / per_task;
        worker.share(num_tasks, [&](std::int64_t task) {
            auto* scratch = reinterpret_cast<float*>(worker.scratch());
            const std::int64_t end = std::min(num_pieces, (task + 1) * per_task);
            for (std::int64_t i = task * per_task; i < end; ++i) {
                const int col = static_cast<int>(i % pieces_per_row) * piece_;
                body_(step, Piece{i / pieces_per_row, col, std::min(piece_, cols_ - col)}, scratch);
            }
        });
    }

    std::size_t scratch_bytes(const Step&) const override {
        return sizeof(float) * static_cast<std::size_t>(padded_cols(piece_) * scratch_rows_);
    }

private:
    std::string_view name_;
    int cols_;
    int piece_;
    int scratch_rows_;
    Body body_;
};

template <class Body>
void add_piece_op(Program& program, std::string_view name, int cols, int piece, int scratch_rows, Body body) {
    require(cols >= 1, "an operation needs at least one column");
    program.add(std::make_unique<PieceOp<Body>>(name, cols, piece, scratch_rows, std::move(body)));
}

void load(const DenseKernels& kernels, const Rows& rows, const Piece& piece, float* to) {
    if (rows.dtype == DType::bf16)
        return kernels.load_bf16(rows.row<std::uint16_t>(piece.row) + piece.col, piece.n, to);
    kernels.load_f32(rows.row<float>(piece.row) + piece.col, piece.n, to);
}

void add(const DenseKernels& kernels, const Rows& rows, const Piece& piece, float* to) {
    if (rows.dtype == DType::bf16)
        return kernels.add_bf16(rows.row<std::uint16_t>(piece.row) + piece.col, piece.n, to);
    kernels.add_f32(rows.row<float>(piece.row) + piece.col, piece.n, to);
}

void store(const DenseKernels& kernels, const float* from, const Rows& rows, const Piece& piece) {
    if (rows.dtype == DType::bf16)
        return kernels.store_bf16(from, piece.n, rows.row<std::uint16_t>(piece.row) + piece.col);
    kernels.store_f32(from, piece.n, rows.row<float>(piece.row) + piece.col);
}

// Write a finished row to where it goes, quantized if that is int8.
void emit(const DenseKernels& kernels, const Step& step, const float* from, const RowsOut& out,
          const Piece& piece) {
    if (const auto* plain = std::get_if<Ref>(&out)) return store(kernels, from, step.at(*plain), piece);
    const auto& quantized = std::get<QuantizedRef>(out);
    auto* values = step.at(quantized.values).row<std::int8_t>(piece.row);
    auto* sums = step.at(quantized.sums).row<std::int32_t>(piece.row);
    *step.at(quantized.scales).row<float>(piece.row) = kernels.quantize(from, piece.n, values, sums);
}

void require_quantized(const QuantizedRef& out, int cols) {
    require(out.values.dtype == DType::i8 && out.values.cols == cols,
            "quantized values must be i8, as wide as the rows");
    require(out.scales.dtype == DType::f32 && out.scales.cols == 1,
            "quantized scales must be f32, one a row");
    require(out.sums.dtype == DType::i32 && out.sums.cols == padded_cols(cols) / sum_group,
            "quantized sums must be i32, two for every 64 values");
}

void require_rows(const Ref& ref, int cols) {
    require(is_float(ref), "rows must be bf16 or f32");
    require(ref.cols == cols, "rows must be equally wide");
}

void require_out(const RowsOut& out, int cols) {
    if (const auto* plain = std::get_if<Ref>(&out)) return require_rows(*plain, cols);
    require_quantized(std::get<QuantizedRef>(out), cols);
}

// Whole rows where a row's maximum is needed, else pieces.
int piece_for(const RowsOut& out, int cols) { return std::holds_alternative<Ref>(out) ? piece_values : cols; }

void require_norm(const NormArgs& args) {
    require_rows(args.x, args.x.cols);
    require_out(args.out, args.x.cols);
    if (args.residual) require_rows(*args.residual, args.x.cols);
    if (args.sum) require_rows(*args.sum, args.x.cols);
    require(args.group >= 1 && args.x.cols % args.group == 0, "group must divide the row");
    require(args.eps > 0.0f, "eps must be above 0");
}

// x + residual in scratch, as it was stored where it is stored: what is normed is what later layers read.
void load_sum(const DenseKernels& kernels, const Step& step, const NormArgs& args, const Piece& piece,
              float* row) {
    load(kernels, step.at(args.x), piece, row);
    if (args.residual) add(kernels, step.at(*args.residual), piece, row);
    if (!args.sum) return;
    store(kernels, row, step.at(*args.sum), piece);
    if (args.sum->dtype == DType::bf16) load(kernels, step.at(*args.sum), piece, row);
}

}  // namespace

const DenseKernels& dense_kernels(Isa isa) {
#if defined(__x86_64__)
    if (isa >= Isa::avx512) return dense_kernels_avx512();
    if (isa == Isa::avx2) return dense_kernels_avx2();
#else
    (void)isa;
#endif
    return dense_kernels_scalar();
}

RowActivation activation_named(std::string_view name) {
    if (name == "silu") return RowActivation::silu;
    if (name == "gelu") return RowActivation::gelu;
    if (name == "gelu_tanh") return RowActivation::gelu_tanh;
    throw std::invalid_argument("activation must be silu, gelu or gelu_tanh, not " + std::string(name));
}

void add_embedding(Program& program, const EmbeddingArgs& args) {
    require(args.ids.dtype == DType::i64 && args.ids.cols == 1, "ids must be i64, one a row");
    require_rows(args.out, args.out.cols);
    const DenseKernels& kernels = dense_kernels(program.isa());
    add_piece_op(program, "embedding", args.out.cols, piece_values, 1,
                 [=, &kernels](const Step& step, const Piece& piece, float* row) {
        const std::int64_t id = *step.at(args.ids).row<std::int64_t>(piece.row);
        if (id >= 0 && id < args.num_rows) {
            kernels.load_bf16(args.table + id * args.row_stride + piece.col, piece.n, row);
            if (args.scale != 1.0f) kernels.scale(row, piece.n, args.scale);
        } else {
            std::fill_n(row, piece.n, __builtin_nanf(""));
        }
        store(kernels, row, step.at(args.out), piece);
    });
}

void add_rms_norm(Program& program, const NormArgs& args) {
    require_norm(args);
    const DenseKernels& kernels = dense_kernels(program.isa());
    add_piece_op(program, args.residual ? "add_rms_norm" : "rms_norm", args.x.cols, args.x.cols, 1,
                 [=, &kernels](const Step& step, const Piece& piece, float* row) {
        load_sum(kernels, step, args, piece, row);
        for (int start = 0; start < piece.n; start += args.group) {
            kernels.rms_norm(row + start, args.group, args.weight, args.eps, args.weight_offset);
        }
        emit(kernels, step, row, args.out, piece);
    });
}

void add_layer_norm(Program& program, const NormArgs& args) {
    require_norm(args);
    const DenseKernels& kernels = dense_kernels(program.isa());
    add_piece_op(program, args.residual ? "add_layer_norm" : "layer_norm", args.x.cols, args.x.cols, 1,
                 [=, &kernels](const Step& step, const Piece& piece, float* row) {
        load_sum(kernels, step, args, piece, row);
        kernels.layer_norm(row, piece.n, args.weight, args.bias, args.eps);
        emit(kernels, step, row, args.out, piece);
    });
}

void add_quantize(Program& program, const Ref& x, const QuantizedRef& out) {
    require_rows(x, x.cols);
    require_quantized(out, x.cols);
    const DenseKernels& kernels = dense_kernels(program.isa());
    add_piece_op(program, "quantize", x.cols, x.cols, 1,
                 [=, &kernels](const Step& step, const Piece& piece, float* row) {
        load(kernels, step.at(x), piece, row);
        emit(kernels, step, row, out, piece);
    });
}

void add_convert(Program& program, const Ref& x, const Ref& out) {
    require_rows(x, x.cols);
    require_rows(out, x.cols);
    const DenseKernels& kernels = dense_kernels(program.isa());
    add_piece_op(program, "convert", x.cols, piece_values, 1,
                 [=, &kernels](const Step& step, const Piece& piece, float* row) {
        load(kernels, step.at(x), piece, row);
        store(kernels, row, step.at(out), piece);
    });
}

void add_sum(Program& program, const Ref& a, const Ref& b, const Ref& out) {
    require_rows(a, a.cols);
    require_rows(b, a.cols);
    require_rows(out, a.cols);
    const DenseKernels& kernels = dense_kernels(program.isa());
    add_piece_op(program, "sum", a.cols, piece_values, 1,
                 [=, &kernels](const Step& step, const Piece& piece, float* row) {
        load(kernels, step.at(a), piece, row);
        add(kernels, step.at(b), piece, row);
        store(kernels, row, step.at(out), piece);
    });
}

void add_scale(Program& program, const Ref& x, float factor, const Ref& out) {
    require_rows(x, x.cols);
    require_rows(out, x.cols);
    const DenseKernels& kernels = dense_kernels(program.isa());
    add_piece_op(program, "scale", x.cols, piece_values, 1,
                 [=, &kernels](const Step& step, const Piece& piece, float* row) {
        load(kernels, step.at(x), piece, row);
        kernels.scale(row, piece.n, factor);
        store(kernels, row, step.at(out), piece);
    });
}

void add_activation(Program& program, const Ref& x, RowActivation activation, const RowsOut& out) {
    require_rows(x, x.cols);
    require_out(out, x.cols);
    const DenseKernels& kernels = dense_kernels(program.isa());
    add_piece_op(program, "activation", x.cols, piece_for(out, x.cols), 1,
                 [=, &kernels](const Step& step, const Piece& piece, float* row) {
        load(kernels, step.at(x), piece, row);
        kernels.activate(row, piece.n, activation);
        emit(kernels, step, row, out, piece);
    });
}

void add_gated_activation(Program& program, const Ref& gate, const Ref& up, RowActivation activation,
                          const RowsOut& out) {
    require_rows(gate, gate.cols);
    require_rows(up, gate.cols);
    require_out(out, gate.cols);
    const DenseKernels& kernels = dense_kernels(program.isa());
    const int piece_cols = std::min(piece_for(out, gate.cols), gate.cols);
    add_piece_op(program, "gated_activation", gate.cols, piece_cols, 2,
                 [=, &kernels](const Step& step, const Piece& piece, float* row) {
        float* by = row + padded_cols(piece_cols);
        load(kernels, step.at(gate), piece, row);
        load(kernels, step.at(up), piece, by);
        kernels.activate(row, piece.n, activation);
        kernels.multiply(row, piece.n, by);
        emit(kernels, step, row, out, piece);
    });
}

void add_softcap(Program& program, const Ref& x, float cap) {
    require_rows(x, x.cols);
    require(cap > 0.0f, "cap must be above 0");
    const DenseKernels& kernels = dense_kernels(program.isa());
    add_piece_op(program, "softcap", x.cols, piece_values, 1,
                 [=, &kernels](const Step& step, const Piece& piece, float* row) {
        load(kernels, step.at(x), piece, row);
        kernels.softcap(row, piece.n, cap);
        store(kernels, row, step.at(x), piece);
    });
}

}  // namespace penstock
