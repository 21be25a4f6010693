// Aligned scratch memory that frees itself.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdlib>
#include <new>

namespace fastedit {

template <typename T>
class Buffer {
  public:
    explicit Buffer(std::size_t count) {
        // Large buffers ask for huge pages: tiles walk through more small ones than the TLB holds, and every
        // small page is a fault.
        const std::size_t align = count * sizeof(T) > kHuge / 4 ? kHuge : 64;
        const std::size_t bytes = (count * sizeof(T) + align - 1) / align * align;
        data_ = static_cast<T*>(std::aligned_alloc(align, bytes > 0 ? bytes : align));
        if (data_ == nullptr) throw std::bad_alloc();
#ifdef __linux__
        if (align == kHuge) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    T* get() const { return data_; }

  private:
    static constexpr std::size_t kHuge = std::size_t{2} << 20;
    T* data_;
};

}  // namespace fastedit
