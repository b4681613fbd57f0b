// An op of torch in native code: what torch's dispatcher calls without Python in between.
//
// torch has a C interface for this that is kept stable across its versions. No header and no library of torch is needed: the
// addresses of the few functions that are used come from kernels/cpu/native_op.py.
//
// Arguments come as 64-bit words on a stack: a tensor as a handle that the op owns, an optional one as null or the address of
// such a word (to be freed), numbers as they are. The result takes the place of the first.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "threads.h"
#include "tiles.h"

namespace {

using Handle = void*;

constexpr int64_t kMostDims = 8;  // of what has rows; others go to the twin in Python

// In the order of `FUNCTIONS` in native_op.py.
struct Torch {
    int32_t (*data)(Handle, void**);
    int32_t (*dim)(Handle, int64_t*);
    int32_t (*sizes)(Handle, int64_t**);
    int32_t (*strides)(Handle, int64_t**);
    int32_t (*dtype)(Handle, int32_t*);
    int32_t (*empty)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
    int32_t (*drop)(Handle);
    int32_t (*call)(const char*, const char*, uint64_t*);
    int32_t (*threads)(uint32_t*);
    const char* (*said)();  // what the last error was; null where torch does not tell
    int32_t float32, bfloat16, boolean, uint8, cpu, int64, float64, float16;
};

Torch torch;
Team torch_team = nullptr;

inline void checked(int32_t error) {
    if (error) throw std::runtime_error("torch could not do what a native op asked of it");
}

// A tensor of the stack; owned, and given back at the end.
struct Tensor {
    Handle handle = nullptr;
    char* data = nullptr;
    int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
    int32_t dtype = 0;

    Tensor() = default;
    explicit Tensor(Handle h) : handle(h) { look(); }
    Tensor(const Tensor&) = delete;
    Tensor(Tensor&& other) noexcept { std::memcpy(static_cast<void*>(this), &other, sizeof other), other.handle = nullptr; }
    Tensor& operator=(const Tensor&) = delete;
    Tensor& operator=(Tensor&& other) noexcept {
        if (handle) torch.drop(handle);
        std::memcpy(static_cast<void*>(this), &other, sizeof other), other.handle = nullptr;
        return *this;
    }
    ~Tensor() {
        if (handle) torch.drop(handle);
    }

    explicit operator bool() const { return handle; }
    int64_t size(int64_t at) const { return sizes[at < 0 ? dim + at : at]; }
    int64_t stride(int64_t at) const { return strides[at < 0 ? dim + at : at]; }
    int type() const { return dtype == torch.float32 ? kFloat32 : dtype == torch.bfloat16 ? kBfloat16 : -1; }
    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(data);
    }

    // Whether it is `count` numbers of a type, one after the other.
    bool holds(int32_t type, int64_t count) const {
        int64_t step = 1;
        for (int64_t i = dim - 1; i >= 0; step *= sizes[i--])
            if (sizes[i] != 1 && strides[i] != step) return false;
        return dtype == type && step == count;
    }

    // Whether all sizes but the last are those of another one.
    bool leads_as(const Tensor& other) const { return dim == other.dim && std::equal(sizes, sizes + dim - 1, other.sizes); }

    // Rows of `width` elements that lie together, one pitch apart; false where they do not, or are neither type.
    bool rows(int64_t width, int64_t* count, int64_t* pitch) const {
        if (!dim || dim > kMostDims || size(-1) != width || type() < 0 || (width > 1 && stride(-1) != 1)) return false;
        *count = 1, *pitch = width;
        bool first = true;
        int64_t next = 0;
        for (int64_t i = dim - 2; i >= 0; --i) {
            *count *= sizes[i];
            if (sizes[i] == 1) continue;
            if (first)
                *pitch = strides[i], first = false;
            else if (strides[i] != next)
                return false;
            next = strides[i] * sizes[i];
        }
        return true;
    }

    std::string shape() const {
        std::string said;
        for (int64_t i = 0; i < dim; ++i) said += (i ? ", " : "") + std::to_string(sizes[i]);
        return "[" + said + "]";
    }

    Handle release() {
        const Handle kept = handle;
        handle = nullptr;
        return kept;
    }

    // On the CPU, contiguous but for the order of its dimensions.
    static Tensor empty(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
        Handle made;
        checked(torch.empty(dim, sizes, strides, dtype, torch.cpu, 0, &made));
        return Tensor(made);
    }

    // As this one, which has rows, with another last size, contiguous.
    Tensor like(int64_t width) const {
        int64_t shape[kMostDims], steps[kMostDims], step = 1;
        for (int64_t i = dim - 1; i >= 0; --i) {
            shape[i] = i == dim - 1 ? width : sizes[i];
            steps[i] = step, step *= shape[i] ? shape[i] : 1;
        }
        return empty(dim, shape, steps, dtype);
    }

    // One number of a type for each row of this one.
    Tensor leading(int32_t type) const {
        int64_t steps[kMostDims], step = 1;
        for (int64_t i = dim - 2; i >= 0; --i) steps[i] = step, step *= sizes[i] ? sizes[i] : 1;
        return empty(dim - 1, sizes, steps, type);
    }

  private:
    void look() {
        void* at;
        checked(torch.data(handle, &at));
        checked(torch.dim(handle, &dim));
        checked(torch.sizes(handle, &sizes));
        checked(torch.strides(handle, &strides));
        checked(torch.dtype(handle, &dtype));
        data = static_cast<char*>(at);
    }
};

// The words of the stack, one after the other.
class Arguments {
  public:
    explicit Arguments(const uint64_t* stack) : at_(stack) {}
    Tensor tensor() { return Tensor(reinterpret_cast<Handle>(*at_++)); }
    Tensor optional() {
        uint64_t* const word = reinterpret_cast<uint64_t*>(*at_++);
        if (!word) return Tensor();
        const Handle handle = reinterpret_cast<Handle>(*word);
        delete word;
        return Tensor(handle);
    }
    int64_t integer() { return static_cast<int64_t>(*at_++); }
    bool boolean() { return static_cast<uint8_t>(*at_++); }
    double real() {
        double value;
        std::memcpy(&value, at_++, 8);
        return value;
    }
    // A number that may be missing.
    double optional_real(double missing) {
        uint64_t* const word = reinterpret_cast<uint64_t*>(*at_++);
        if (!word) return missing;
        double value;
        std::memcpy(&value, word, 8);
        delete word;
        return value;
    }

  private:
    const uint64_t* at_;
};

inline int torch_threads() {
    uint32_t count = 1;
    torch.threads(&count);
    return static_cast<int>(count);
}

inline uint64_t word(Handle handle) { return reinterpret_cast<uint64_t>(handle); }

// The words of all arguments again, for the op's twin in Python: what this code has no way for.
class Refill {
  public:
    explicit Refill(uint64_t* stack) : stack_(stack) {}
    Refill& operator<<(Tensor& tensor) { return put(word(tensor.release())); }
    Refill& optional(Tensor& tensor) { return put(tensor ? word(new uint64_t(word(tensor.release()))) : 0); }
    Refill& operator<<(int64_t value) { return put(static_cast<uint64_t>(value)); }
    Refill& operator<<(double value) {
        uint64_t bits;
        std::memcpy(&bits, &value, 8);
        return put(bits);
    }
    Refill& optional_real(double value) {  // NaN: none
        uint64_t bits;
        std::memcpy(&bits, &value, 8);
        return put(value != value ? 0 : word(new uint64_t(bits)));
    }
    void call(const char* name) {
        if (!torch.call(name, "", stack_)) return;
        const char* const said = torch.said ? torch.said() : nullptr;
        throw std::runtime_error(said && *said ? said : std::string(name) + " failed");
    }

  private:
    static uint64_t word(const void* address) { return reinterpret_cast<uint64_t>(address); }
    Refill& put(uint64_t value) { return stack_[count_++] = value, *this; }
    uint64_t* stack_;
    int64_t count_ = 0;
};

}  // namespace

extern "C" {

// Both may come again: after a fork there is no team.
void dlqc_bind(const Torch* functions, Team team) { torch = *functions, torch_team = team; }

}  // extern "C"
