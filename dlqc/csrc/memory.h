// Aligned memory, in large pages where the system has them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// Asks for large pages where they are to be asked for: a fresh matrix of 100 MB is 25,000 page faults without.
void large_pages(void* data, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t page = 1 << 21;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

// Memory at a multiple of a cache line; null where there is none left.
template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t count)
        : data_(static_cast<T*>(::operator new(std::max<int64_t>(count, 1) * sizeof(T), std::align_val_t(64), std::nothrow))) {
        if (data_) large_pages(data_, count * sizeof(T));
    }
    Buffer(const Buffer&) = delete;
    Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
    ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
    T* get() const { return data_; }

  private:
    T* data_;
};

}  // namespace
