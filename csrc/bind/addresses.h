// Memory that Python names by its address: arrays and tensors, which it keeps alive while they are in use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace penstock {

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <class T>
std::span<const T> span_at(std::uintptr_t address, std::size_t size) {
    return {at<const T>(address), size};
}

}  // namespace penstock
