// See huge_buffer.h.
#include "penstock/huge_buffer.h"

#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <new>
#include <utility>

namespace penstock {

namespace {

constexpr std::size_t huge_page = std::size_t{2} << 20;  // x86's and arm64's usual large page
constexpr std::size_t page = 4096;
constexpr std::size_t shared_size = std::size_t{64} << 20;  // only what its parts touch becomes memory
constexpr std::size_t part_size_max = shared_size / 4;      // larger ones lose little by a mapping of their own

std::size_t round_up(std::size_t value, std::size_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

HugeBuffer::HugeBuffer(std::size_t bytes) : size_(bytes) {
    if (bytes == 0) return;
    const bool is_large = bytes >= huge_page;
    // A huge page more than asked for, so that the start can be aligned to one.
    map_size_ = is_large ? round_up(bytes, huge_page) + huge_page : round_up(bytes, page);
    map_ = mmap(nullptr, map_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map_ == MAP_FAILED) {
        map_ = nullptr;
        throw std::bad_alloc();
    }
    auto start = reinterpret_cast<std::uintptr_t>(map_);
    if (is_large) start = round_up(start, huge_page);
    data_ = reinterpret_cast<std::byte*>(start);
#if defined(MADV_HUGEPAGE)
    if (is_large) madvise(data_, round_up(bytes, huge_page), MADV_HUGEPAGE);
#endif
}

HugeBuffer HugeBuffer::part(std::size_t bytes) {
    if (bytes == 0 || bytes > part_size_max) return HugeBuffer(bytes);
    static std::mutex mutex;
    static std::weak_ptr<HugeBuffer> latest;
    static std::size_t used = 0;
    const std::lock_guard lock(mutex);
    const std::size_t taken = round_up(bytes, page);
    std::shared_ptr<HugeBuffer> whole = latest.lock();
    if (!whole || used + taken > whole->size_) {
        latest = whole = std::make_shared<HugeBuffer>(shared_size);
        used = 0;
    }
    HugeBuffer part;
    part.data_ = whole->data_ + used;
    part.size_ = bytes;
    part.whole_ = std::move(whole);
    used += taken;
    return part;
}

HugeBuffer::~HugeBuffer() {
    if (map_) munmap(map_, map_size_);
}

HugeBuffer::HugeBuffer(HugeBuffer&& other) noexcept { *this = std::move(other); }

HugeBuffer& HugeBuffer::operator=(HugeBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(map_, other.map_);
    std::swap(map_size_, other.map_size_);
    std::swap(whole_, other.whole_);
    return *this;
}

}  // namespace penstock
