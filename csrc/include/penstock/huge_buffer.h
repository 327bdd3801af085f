// Zeroed anonymous memory in huge pages where the kernel allows them: weights, activations, scratch.
#pragma once

#include <cstddef>
#include <memory>

namespace penstock {

class HugeBuffer {
public:
    HugeBuffer() = default;
    // Throws std::bad_alloc where the kernel refuses. Pages are handed out at first touch.
    explicit HugeBuffer(std::size_t bytes);
    // A part of a mapping that many such buffers share, so that small ones lie in huge pages too and none is
    // rounded up to one. The mapping goes back when its last part does: for buffers that live equally long (a
    // model's weights).
    static HugeBuffer part(std::size_t bytes);
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
    std::shared_ptr<HugeBuffer> whole_;  // of a part
};

}  // namespace penstock
