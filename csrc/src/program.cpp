// See program.h.
#include "penstock/program.h"

#include <chrono>

namespace penstock {

namespace {

// Kernels read whole 128-byte groups (64 bf16) of a row, so rows are padded to that.
constexpr std::int64_t row_alignment = 128;
// Rows a multiple of this apart fall into few sets of the L1 cache; such rows get one more group.
constexpr std::int64_t bad_stride = 1024;
// Buffers grow to a multiple of this many rows, so that slowly growing batches do not allocate each time.
constexpr std::int64_t row_granularity = 16;

std::int64_t padded_row_bytes(DType dtype, int cols) {
    const auto bytes = static_cast<std::int64_t>(item_bytes(dtype)) * cols;
    const std::int64_t padded = (bytes + row_alignment - 1) / row_alignment * row_alignment;
    return padded % bad_stride == 0 ? padded + row_alignment : padded;
}

}  // namespace

std::size_t item_bytes(DType dtype) {
    switch (dtype) {
        case DType::bf16: return 2;
        case DType::f32: return 4;
        case DType::i8: return 1;
        case DType::i32: return 4;
        case DType::i64: return 8;
    }
    return 0;
}

Ref Program::add_buffer(DType dtype, int cols) {
    buffers_.push_back({dtype, cols, padded_row_bytes(dtype, cols), false});
    capacity_rows_ = 0;
    return {static_cast<int>(buffers_.size()) - 1, 0, cols, dtype};
}

Ref Program::add_external(DType dtype, int cols) {
    buffers_.push_back({dtype, cols, 0, true});
    return {static_cast<int>(buffers_.size()) - 1, 0, cols, dtype};
}

bool Program::is_padded(const Ref& ref) const {
    if (ref.cols % 64 == 0) return true;
    const Buffer& buffer = buffers_[static_cast<std::size_t>(ref.buffer)];
    return !buffer.is_external && ref.col % 64 == 0 && ref.col + ref.cols == buffer.cols;
}

void Program::reserve(std::int64_t num_rows) {
    if (num_rows <= capacity_rows_) return;
    const std::int64_t rows = (num_rows + row_granularity - 1) / row_granularity * row_granularity;
    std::int64_t bytes = 0;
    for (const Buffer& buffer : buffers_) bytes += buffer.is_external ? 0 : rows * buffer.row_bytes;
    arena_ = HugeBuffer();  // give the old one back before taking the new one
    arena_ = HugeBuffer(static_cast<std::size_t>(bytes));
    capacity_rows_ = rows;
}

void Program::shrink() {
    arena_ = HugeBuffer();
    shared_ = HugeBuffer();
    capacity_rows_ = 0;
}

Step Program::bind(std::int64_t num_rows, std::span<const External> externals,
                   std::span<const AttentionInputs> groups) {
    reserve(num_rows);
    if (shared_.size() < shared_bytes_) shared_ = HugeBuffer(shared_bytes_);
    bound_.clear();
    std::byte* own = arena_.data();
    std::size_t next_external = 0;
    for (const Buffer& buffer : buffers_) {
        if (buffer.is_external) {
            const External& given = externals[next_external++];
            bound_.push_back({given.data, given.row_bytes, buffer.cols, buffer.dtype});
        } else {
            bound_.push_back({own, buffer.row_bytes, buffer.cols, buffer.dtype});
            own += capacity_rows_ * buffer.row_bytes;
        }
    }
    return {num_rows, groups, layers_, bound_, shared_.data()};
}

void Program::run(std::int64_t num_rows, std::span<const External> externals,
                  std::span<const AttentionInputs> groups) {
    const Step step = bind(num_rows, externals, groups);
    pool_->run([&](Worker& worker) {
        for (const auto& op : ops_) {
            op->run(step, worker);
            worker.barrier();
        }
    });
}

void Program::profile(std::int64_t num_rows, std::span<const External> externals,
                      std::span<const AttentionInputs> groups, std::vector<double>& seconds) {
    using Clock = std::chrono::steady_clock;
    const Step step = bind(num_rows, externals, groups);
    seconds.resize(ops_.size());
    pool_->run([&](Worker& worker) {
        auto began = Clock::now();
        for (std::size_t i = 0; i < ops_.size(); ++i) {
            ops_[i]->run(step, worker);
            worker.barrier();
            const auto ended = Clock::now();
            if (worker.id == 0) seconds[i] += std::chrono::duration<double>(ended - began).count();
            began = ended;
        }
    });
}

std::vector<std::string_view> Program::op_names() const {
    std::vector<std::string_view> names;
    for (const auto& op : ops_) names.push_back(op->name());
    return names;
}

}  // namespace penstock
