// Angles, rotation and cache writes as operations. See attention.h.
//
// The angle is a float32 product, as in training; its cosine and sine are computed in double, so that they
// are exact to a rounding.
#include <cmath>
#include <stdexcept>
#include <string>

#include "penstock/attention.h"

namespace penstock {

namespace {

constexpr std::int64_t max_rows_at_once = 16;  // a granule of one sequence's tokens: its lines are written by one thread

void expect(bool is_right, const char* what) {
    if (!is_right) throw std::invalid_argument(what);
}

// Call task(row) for every row of the step, in runs of neighbours.
template <class Task>
void for_each_row(const Step& step, Worker& worker, Task&& task) {
    const std::int64_t fair = step.num_rows / (4 * worker.count);
    const std::int64_t num = fair < 1 ? 1 : fair < max_rows_at_once ? fair : max_rows_at_once;
    worker.share((step.num_rows + num - 1) / num, [&](std::int64_t i) {
        for (std::int64_t row = i * num; row < (i + 1) * num && row < step.num_rows; ++row) task(row);
    });
}

class RopeAngles final : public Op {
public:
    explicit RopeAngles(const RopeAnglesArgs& args) : args_(args) {}
    std::string_view name() const override { return "rope_angles"; }

    void run(const Step& step, Worker& worker) const override {
        const Rows positions = step.at(args_.positions), out = step.at(args_.out);
        for_each_row(step, worker, [&](std::int64_t row) {
            const auto position = static_cast<float>(*positions.row<std::int64_t>(row));
            float* to = out.row<float>(row);
            for (int i = 0; i < args_.num_frequencies; ++i) {
                const double angle = position * args_.frequencies[i];
                to[i] = static_cast<float>(std::cos(angle) * static_cast<double>(args_.factor));
                to[args_.num_frequencies + i] =
                    static_cast<float>(std::sin(angle) * static_cast<double>(args_.factor));
            }
        });
    }

private:
    RopeAnglesArgs args_;
};

class Rotate final : public Op {
public:
    Rotate(const RopeArgs& args, const AttentionKernels& kernels) : args_(args), kernels_(kernels) {}
    std::string_view name() const override { return "rope"; }

    void run(const Step& step, Worker& worker) const override {
        const Rows x = step.at(args_.x), angles = step.at(args_.angles), out = step.at(args_.out);
        for_each_row(step, worker, [&](std::int64_t row) {
            kernels_.rotate(x.row<std::uint16_t>(row), angles.row<float>(row), x.cols / args_.head_dim,
                            args_.head_dim, angles.cols / 2, out.row<std::uint16_t>(row));
        });
    }

private:
    RopeArgs args_;
    const AttentionKernels& kernels_;
};

// Where a token's keys and values go.
class KvWriter {
public:
    KvWriter(const WriteKvArgs& args, const AttentionKernels& kernels)
        : shape_(args.shape),
          write_key_(kernels.write_key[static_cast<int>(args.shape.format)]),
          write_value_(kernels.write_value[static_cast<int>(args.shape.format)]) {}

    void write(const LayerKv& layer, std::int64_t slot, const std::uint16_t* keys,
               const std::uint16_t* values) const {
        const std::int64_t block = slot / shape_.block_size;
        const int offset = static_cast<int>(slot % shape_.block_size), token = offset % granule_tokens;
        std::int64_t at = block * layer.block_bytes + offset / granule_tokens * shape_.granule_bytes();
        for (int h = 0; h < shape_.num_kv_heads; ++h, at += shape_.head_bytes()) {
            write_key_(keys + h * shape_.head_dim, shape_.head_dim, token, layer.keys + at);
            write_value_(values + h * shape_.head_dim, shape_.head_dim, token, layer.values + at);
        }
    }

private:
    KvShape shape_;
    void (*write_key_)(const std::uint16_t*, int, int, std::byte*);
    void (*write_value_)(const std::uint16_t*, int, int, std::byte*);
};

class WriteKv final : public Op {
public:
    WriteKv(const WriteKvArgs& args, const AttentionKernels& kernels) : args_(args), writer_(args, kernels) {}
    std::string_view name() const override { return "write_kv"; }

    void run(const Step& step, Worker& worker) const override {
        const Rows keys = step.at(args_.keys), values = step.at(args_.values);
        const LayerKv& layer = step.layers[static_cast<std::size_t>(args_.layer)];
        const std::int64_t* slots = step.groups[static_cast<std::size_t>(layer.group)].slot_mapping;
        for_each_row(step, worker, [&](std::int64_t row) {
            writer_.write(layer, slots[row], keys.row<std::uint16_t>(row), values.row<std::uint16_t>(row));
        });
    }

private:
    WriteKvArgs args_;
    KvWriter writer_;
};

class RopeWriteKv final : public Op {
public:
    RopeWriteKv(const Ref& query, const Ref& angles, const WriteKvArgs& args, const AttentionKernels& kernels)
        : query_(query), angles_(angles), args_(args), kernels_(kernels), writer_(args, kernels) {}
    std::string_view name() const override { return "rope_write_kv"; }

    void run(const Step& step, Worker& worker) const override {
        const Rows query = step.at(query_), angles = step.at(angles_), keys = step.at(args_.keys),
                   values = step.at(args_.values);
        const LayerKv& layer = step.layers[static_cast<std::size_t>(args_.layer)];
        const std::int64_t* slots = step.groups[static_cast<std::size_t>(layer.group)].slot_mapping;
        const int head_dim = args_.shape.head_dim, num_kv_heads = args_.shape.num_kv_heads,
                  half = angles_.cols / 2;
        auto* rotated = reinterpret_cast<std::uint16_t*>(worker.scratch());
        for_each_row(step, worker, [&](std::int64_t row) {
            auto* q = query.row<std::uint16_t>(row);
            kernels_.rotate(q, angles.row<float>(row), query_.cols / head_dim, head_dim, half, q);
            kernels_.rotate(keys.row<std::uint16_t>(row), angles.row<float>(row), num_kv_heads, head_dim,
                            half, rotated);
            writer_.write(layer, slots[row], rotated, values.row<std::uint16_t>(row));
        });
    }

    std::size_t scratch_bytes(const Step&) const override {
        return static_cast<std::size_t>(args_.shape.num_kv_heads * args_.shape.head_dim) *
               sizeof(std::uint16_t);
    }

private:
    Ref query_, angles_;
    WriteKvArgs args_;
    const AttentionKernels& kernels_;
    KvWriter writer_;
};

void check_angles(const Ref& angles, int head_dim) {
    expect(angles.dtype == DType::f32, "angles must be f32");
    if (angles.cols % 2 != 0 || angles.cols > head_dim) {
        throw std::invalid_argument("angles must have an even number of columns, at most head_dim (" +
                                    std::to_string(head_dim) + "), not " + std::to_string(angles.cols));
    }
}

void check_heads(const Ref& x, int head_dim, const char* what) {
    expect(x.dtype == DType::bf16, "queries, keys and values must be bf16");
    if (head_dim < 1 || x.cols % head_dim != 0) {
        throw std::invalid_argument(std::string(what) + " must be whole heads of " +
                                    std::to_string(head_dim) + " columns, not " + std::to_string(x.cols));
    }
}

void check_write(const WriteKvArgs& args) {
    args.shape.check();
    check_heads(args.keys, args.shape.head_dim, "keys");
    check_heads(args.values, args.shape.head_dim, "values");
    const int cols = args.shape.num_kv_heads * args.shape.head_dim;
    expect(args.keys.cols == cols && args.values.cols == cols,
           "keys and values must have num_kv_heads * head_dim columns");
    expect(args.layer >= 0, "layer must be 0 or more");
}

}  // namespace

void add_rope_angles(Program& program, const RopeAnglesArgs& args) {
    expect(args.positions.dtype == DType::i64 && args.positions.cols == 1, "positions must be i64 [rows, 1]");
    expect(args.num_frequencies >= 1, "num_frequencies must be 1 or more");
    expect(args.out.dtype == DType::f32 && args.out.cols == 2 * args.num_frequencies,
           "out must be f32 with 2 * num_frequencies columns");
    program.add(std::make_unique<RopeAngles>(args));
}

void add_rope(Program& program, const RopeArgs& args) {
    check_heads(args.x, args.head_dim, "x");
    check_angles(args.angles, args.head_dim);
    expect(args.out.dtype == DType::bf16 && args.out.cols == args.x.cols,
           "out must be bf16 with x's columns");
    program.add(std::make_unique<Rotate>(args, attention_kernels(program.isa())));
}

void add_write_kv(Program& program, const WriteKvArgs& args) {
    check_write(args);
    program.add(std::make_unique<WriteKv>(args, attention_kernels(program.isa())));
}

void add_rope_write_kv(Program& program, const Ref& query, const Ref& angles, const WriteKvArgs& args) {
    check_write(args);
    check_heads(query, args.shape.head_dim, "query");
    check_angles(angles, args.shape.head_dim);
    program.add(std::make_unique<RopeWriteKv>(query, angles, args, attention_kernels(program.isa())));
}

}  // namespace penstock
