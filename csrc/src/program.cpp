// See program.h.
#include "penstock/program.h"

#include <algorithm>
#include <chrono>

namespace penstock {

namespace {

// Kernels read whole 128-byte groups (64 bf16) of a row, so rows are padded to that.
constexpr std::int64_t row_alignment = 128;
// Rows a multiple of this apart fall into few sets of the L1 cache; such rows get one more group.
constexpr std::int64_t bad_stride = 1024;
// Buffers grow to a multiple of this many rows, so that slowly growing batches do not allocate each time.
constexpr std::int64_t row_granularity = 16;

// A waiting thread asks for at most so much of the next operation's weights: a quarter of a usual L2 cache.
// Between two small operations it manages some 100 KiB.
constexpr std::size_t thread_read_bytes = std::size_t{256} << 10;
// Between two programs it asks for at most so much, which must stay in the L3 cache until it is read.
constexpr std::size_t first_read_bytes = std::size_t{16} << 20;
// Steps of more rows leave the cores to whoever else wants them between programs (the API process), and wait
// for less.
constexpr std::int64_t most_rows_for_first_reads = 8;

// A thread finishes its piece before it begins the next job: less than a microsecond.
constexpr std::size_t piece_bytes = std::size_t{16} << 10;

void add_pieces(const Memory& memory, std::vector<Memory>& pieces) {
    for (std::size_t at = 0; at < memory.bytes; at += piece_bytes) {
        pieces.push_back({memory.data + at, std::min(piece_bytes, memory.bytes - at)});
    }
}

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

void Program::add(std::unique_ptr<Op> op) {
    auto reads = std::make_unique<ThreadReads>();
    for (int task = 0; task < pool_->num_threads(); ++task) {
        std::size_t bytes = 0;
        reads->emplace_back();
        for (const Memory& memory : op->reads(task)) {
            if (bytes >= thread_read_bytes) break;
            reads->back().push_back({memory.data, std::min(memory.bytes, thread_read_bytes - bytes)});
            bytes += memory.bytes;
        }
    }
    const bool has_any =
        std::any_of(reads->begin(), reads->end(), [](const auto& of) { return !of.empty(); });
    for (auto after = reads_after_.rbegin(); has_any && after != reads_after_.rend() && !*after; ++after) {
        *after = reads.get();
    }
    reads_.push_back(has_any ? std::move(reads) : nullptr);
    reads_after_.push_back(nullptr);
    ops_.push_back(std::move(op));
}

std::shared_ptr<SharedReads> Program::first_reads() const {
    std::vector<Memory> pieces;
    std::size_t bytes = 0;
    for (const auto& op : ops_) {
        for (int task = 0; bytes < first_read_bytes; ++task) {
            const std::vector<Memory> reads = op->reads(task);
            if (reads.empty()) break;
            for (const Memory& memory : reads) {
                bytes += memory.bytes;
                add_pieces(memory, pieces);
            }
        }
    }
    return std::make_shared<SharedReads>(std::move(pieces));
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
                   std::span<const AttentionInputs> groups, std::span<const AdapterRows> adapters) {
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
    const Step step{num_rows, groups, layers_, bound_, shared_.data(), adapters, {}};
    std::size_t scratch_bytes = 0;
    for (const auto& op : ops_) scratch_bytes = std::max(scratch_bytes, op->scratch_bytes(step));
    pool_->reserve_scratch(scratch_bytes);
    return step;
}

int Program::last_external() const {
    int last = static_cast<int>(buffers_.size()) - 1;
    while (last >= 0 && !buffers_[static_cast<std::size_t>(last)].is_external) --last;
    return last;
}

bool Program::gives_maxima() const {
    const int buffer = last_external();
    return buffer >= 0 && !ops_.empty() &&
           ops_.back()->writes_maxima(buffer, buffers_[static_cast<std::size_t>(buffer)].cols);
}

void Program::run(std::int64_t num_rows, std::span<const External> externals,
                  std::span<const AttentionInputs> groups, std::span<const AdapterRows> adapters,
                  PanelMaxima maxima) {
    Step step = bind(num_rows, externals, groups, adapters);
    step.maxima = maxima;
    step.maxima.buffer = maxima.data ? last_external() : -1;
    pool_->read_between_jobs(reads_ahead_ && num_rows <= most_rows_for_first_reads ? next_reads_ : nullptr);
    pool_->run([&](Worker& worker) {
        for (std::size_t i = 0; i < ops_.size(); ++i) run_op(i, step, worker);
    });
}

void Program::run_op(std::size_t i, const Step& step, Worker& worker) const {
    ops_[i]->run(step, worker);
    const ThreadReads* reads = reads_ahead_ ? reads_after_[i] : nullptr;
    worker.barrier(reads ? &(*reads)[static_cast<std::size_t>(worker.id)] : nullptr);
}

void Program::profile(std::int64_t num_rows, std::span<const External> externals,
                      std::span<const AttentionInputs> groups, std::vector<double>& seconds,
                      std::span<const AdapterRows> adapters) {
    using Clock = std::chrono::steady_clock;
    const Step step = bind(num_rows, externals, groups, adapters);
    pool_->read_between_jobs(reads_ahead_ && num_rows <= most_rows_for_first_reads ? next_reads_ : nullptr);
    seconds.resize(ops_.size());
    pool_->run([&](Worker& worker) {
        auto began = Clock::now();
        for (std::size_t i = 0; i < ops_.size(); ++i) {
            run_op(i, step, worker);
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
