// A recorded pass of a model: buffers, and operations in their order, run by all threads with one call.
//
// The CPU's counterpart of a CUDA graph. A buffer has a row for every token of the step; the number of rows
// is known only when the program runs, everything else when it is made. External buffers (token ids, the
// result) are pointers given at each run. No operation knows Python, torch or another operation.
//
// ```
// row r of a buffer: data + r * row_bytes     [ cols values | zeros up to row_bytes ]
// ```
//
// The padding of an own buffer is zero always: kernels may read it (K rounded up), none may write anything
// else there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "penstock/huge_buffer.h"
#include "penstock/isa.h"
#include "penstock/pool.h"

namespace penstock {

enum class DType : int { bf16, f32, i8, i32, i64 };

std::size_t item_bytes(DType dtype);

// Rows of `cols` values: a buffer, or some columns of one.
struct Rows {
    std::byte* data;
    std::int64_t row_bytes;
    int cols;
    DType dtype;

    template <class T>
    T* row(std::int64_t r) const {
        return reinterpret_cast<T*>(data + r * row_bytes);
    }
};

// Names some columns of a buffer while a program is made.
struct Ref {
    int buffer;
    int col;
    int cols;
    DType dtype;
};

// One cache group's part of the step; all on the host, alive for one run.
struct AttentionInputs {
    std::int64_t num_seqs;
    const std::int32_t* query_start_loc;  // [num_seqs + 1]
    const std::int32_t* seq_lens;         // [num_seqs], the step's tokens included
    const std::int32_t* block_tables;     // [num_seqs, max_num_blocks], -1 where there is none
    std::int64_t max_num_blocks;
    const std::int64_t* slot_mapping;     // [rows], block_id * block_size + offset
};

// Where one layer's keys and values lie; a block's bytes are the kernels' own to arrange (attention.h).
struct LayerKv {
    std::byte* keys = nullptr;
    std::byte* values = nullptr;
    std::int64_t block_bytes = 0;  // from one block of keys (of values) to the next
    int group = 0;                 // index into the step's AttentionInputs
};

// One adapter's part of one product: scale * B (A x); lora.h says how A and B lie. rank 0: none.
struct LowRank {
    const std::uint16_t* a = nullptr;
    const std::uint16_t* b = nullptr;
    int rank = 0;
    float scale = 0.0f;
};

// All of an adapter, by the number of the product (`LoraSite`); whoever made it keeps the weights alive.
struct Adapter {
    std::vector<LowRank> sites;
};

// Rows [first_row, first_row + num_rows) of the step use one adapter; a segment (lora.h).
struct AdapterRows {
    std::int64_t first_row;
    std::int64_t num_rows;
    const LowRank* sites;
};

// Where the product that makes a program's last external (float32) leaves the largest of each 32 columns of
// a row, NaN where there is one, while they are in the cache: whoever looks for the highest need not read all.
struct PanelMaxima {
    float* data = nullptr;         // null asks for none
    std::int64_t row_values = 0;   // from row to row
    int buffer = -1;               // filled in by the program
};

// What an operation sees of the step that runs.
struct Step {
    std::int64_t num_rows;
    std::span<const AttentionInputs> groups;
    std::span<const LayerKv> layers;
    std::span<const Rows> buffers;
    std::byte* shared;  // see Program::reserve_shared
    std::span<const AdapterRows> adapters = {};  // rising and apart; rows in none are the base model's
    PanelMaxima maxima = {};

    Rows at(const Ref& ref) const {
        const Rows& rows = buffers[static_cast<std::size_t>(ref.buffer)];
        return {rows.data + ref.col * static_cast<std::int64_t>(item_bytes(ref.dtype)), rows.row_bytes,
                ref.cols, ref.dtype};
    }
};

// One operation. `run` is called by every thread of the pool; the program puts a barrier after it.
class Op {
public:
    virtual ~Op() = default;
    virtual std::string_view name() const = 0;  // for profiles
    virtual void run(const Step& step, Worker& worker) const = 0;
    // How much of its scratch a thread uses in such a step; asked for before every job.
    virtual std::size_t scratch_bytes(const Step&) const { return 0; }
    // What task `task` of its `share` reads, where that is known and the rows are few; empty past the last
    // task.
    virtual std::vector<Memory> reads(int) const { return {}; }
    // Whether it writes all `cols` float32 columns of a buffer, and their maxima where a step asks for them.
    virtual bool writes_maxima(int /*buffer*/, int /*cols*/) const { return false; }
};

class Program {
public:
    // Args:
    //   isa: which kernels the operations take; one of `supported_isas()`.
    //   is_deterministic: results may not depend on other rows, on the number of threads or on how a sequence is cut
    //     into steps; operations whose fastest form does not keep that take another one.
    Program(std::shared_ptr<Pool> pool, Isa isa, bool is_deterministic)
        : pool_(std::move(pool)), isa_(isa), is_deterministic_(is_deterministic) {}

    Isa isa() const { return isa_; }
    bool is_deterministic() const { return is_deterministic_; }
    Pool& pool() const { return *pool_; }

    // A buffer of its own, zero at first.
    Ref add_buffer(DType dtype, int cols);
    // A buffer whose address (and distance of rows) each run brings, in the order of these calls.
    Ref add_external(DType dtype, int cols);
    // Whether every row of the columns is followed by zeros up to a multiple of 64 values: what the linear
    // kernels read.
    bool is_padded(const Ref& ref) const;
    // Appends an operation; it must refer to buffers of this program only.
    void add(std::unique_ptr<Op> op);

    // At least so many bytes at `Step::shared`, for whichever operation runs: all its threads see the same
    // memory, and what it left there is lost to the next. 64-byte aligned; a page costs memory only once it
    // is touched.
    void reserve_shared(std::size_t bytes) { shared_bytes_ = bytes > shared_bytes_ ? bytes : shared_bytes_; }

    // Where the layers' keys and values are, by layer; stays until the next call.
    void set_layers(std::vector<LayerKv> layers) { layers_ = std::move(layers); }

    struct External {
        std::byte* data;
        std::int64_t row_bytes;
    };

    // Run all operations over `num_rows` rows. `maxima` may be asked for if `gives_maxima`.
    void run(std::int64_t num_rows, std::span<const External> externals,
             std::span<const AttentionInputs> groups, std::span<const AdapterRows> adapters = {},
             PanelMaxima maxima = {});

    // Whether the last operation is a product that makes the last external.
    bool gives_maxima() const;

    // The program that runs after this one, complete: between the two, idle threads ask for what it reads
    // first.
    void set_next(const Program& next) { next_reads_ = next.first_reads(); }

    // Whether threads that wait, in the program and after it, ask for what is read next. For measuring what
    // that gives.
    void set_reads_ahead(bool reads_ahead) { reads_ahead_ = reads_ahead; }

    // The same, one operation at a time: nanoseconds of each in the order of `ops`, added to what stood
    // there.
    void profile(std::int64_t num_rows, std::span<const External> externals,
                 std::span<const AttentionInputs> groups, std::vector<double>& seconds,
                 std::span<const AdapterRows> adapters = {});

    std::vector<std::string_view> op_names() const;
    std::size_t buffer_bytes() const { return arena_.size(); }
    // Free the buffers' memory; the next run takes what it needs.
    void shrink();

private:
    struct Buffer {
        DType dtype;
        int cols;
        std::int64_t row_bytes;
        bool is_external;
    };
    void reserve(std::int64_t num_rows);
    int last_external() const;
    Step bind(std::int64_t num_rows, std::span<const External> externals,
              std::span<const AttentionInputs> groups, std::span<const AdapterRows> adapters);

    std::shared_ptr<SharedReads> first_reads() const;
    void run_op(std::size_t i, const Step& step, Worker& worker) const;

    // By thread, what its first task of an operation reads.
    using ThreadReads = std::vector<std::vector<Memory>>;

    std::shared_ptr<Pool> pool_;
    Isa isa_;
    bool is_deterministic_;
    std::vector<Buffer> buffers_;
    std::vector<std::unique_ptr<Op>> ops_;
    std::vector<std::unique_ptr<ThreadReads>> reads_;    // of each operation, null for none
    std::vector<const ThreadReads*> reads_after_;        // of the next operation that has any; null for none
    std::shared_ptr<SharedReads> next_reads_;            // of the program after this one
    bool reads_ahead_ = true;
    std::vector<LayerKv> layers_;
    std::vector<Rows> bound_;
    HugeBuffer arena_;
    HugeBuffer shared_;
    std::size_t shared_bytes_ = 0;
    std::int64_t capacity_rows_ = 0;
};

}  // namespace penstock
