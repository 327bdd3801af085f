// Zeroed anonymous memory in huge pages where the kernel allows them: weights, activations, scratch.
#pragma once

#include <cstddef>

namespace penstock {

class HugeBuffer {
public:
    HugeBuffer() = default;
    // Throws std::bad_alloc where the kernel refuses. Pages are handed out at first touch.
    explicit HugeBuffer(std::size_t bytes);
    ~HugeBuffer();
    HugeBuffer(HugeBuffer&& other) noexcept;
    HugeBuffer& operator=(HugeBuffer&& other) noexcept;
    HugeBuffer(const HugeBuffer&) = delete;
    HugeBuffer& operator=(const HugeBuffer&) = delete;

    std::byte* data() const { return data_; }
    std::size_t size() const { return size_; }

private:
    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
    void* map_ = nullptr;
    std::size_t map_size_ = 0;
};

}  // namespace penstock
