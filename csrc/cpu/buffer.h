// Cache-line aligned scratch memory that frees itself.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace fastedit {

template <typename T>
class Buffer {
  public:
    explicit Buffer(std::size_t count)
        : data_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64 + 64))) {
        if (data_ == nullptr) throw std::bad_alloc();
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    T* get() const { return data_; }

  private:
    T* data_;
};

}  // namespace fastedit
