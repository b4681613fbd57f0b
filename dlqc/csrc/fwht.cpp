// Block Hadamard transforms of a matrix, along its rows, its columns or both, from and to any floating type.
//
// For x a row of W [rows, cols] the row side computes  x · diag(pre) · (I ⊗ H/√n ⊗ I_inner) · diag(post);  the column
// side does the same to every column. n = k·2^p, H = H_k ⊗ H_2^p: H_k is given, H_2^p is Sylvester's.
//
// One routine, `panel`, does all the arithmetic: it transforms the first index of an array [n, C] in place, with vectors
// along the second. What is left is to bring the matrix into that form:
//
//   columns             an array [n, C] is C columns of the matrix: whole cache lines of each row.
//   long rows           a row is [n/V, V] for vectors of V numbers: butterflies inside each vector, then `panel`.
//   other rows          V rows at a time, transposed into [n, V].
//
// Both sides: column side after row side needs all rows of a block at once, in the wide type, so a *slab* is kept between
// the two. H_2^p = H_2^q ⊗ H_2^(p-q), so the outputs of a column fall into 2^q parts, each of which needs only sums
// and differences of 2^q groups of rows. For each part those sums are read from W again and the slab holds 2^-q of a
// block: more reading of 16-bit numbers, and no wide copy of the matrix.
//
// The order of all additions depends on shapes alone, never on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <type_traits>
#include <utility>
#include <vector>

#include "memory.h"
#include "numbers.h"
#include "parallel.h"

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kRadixBits = 4;  // 32 registers hold 16 values and what is needed beside them
#elif defined(__AVX__)
constexpr int kBytes = 32, kRadixBits = 3;
#else
constexpr int kBytes = 16, kRadixBits = 3;
#endif

constexpr int64_t kPanelBytes = 1 << 19;  // half of a usual level-2 cache
constexpr int64_t kSlab = 1 << 20;    // entries that two sides may keep between them in any case,
constexpr int64_t kShare = 4;         // or this share of the matrix, if it is more,
constexpr int64_t kMostParts = 16;    // unless it takes more readings than this
constexpr int64_t kTask = 1 << 15;        // entries that are worth fetching a task for
constexpr int64_t kThread = 1 << 17;      // entries that are worth starting a thread for

template <class T>
struct Vector;
template <>
struct Vector<float> {
    typedef float type __attribute__((vector_size(kBytes), may_alias));
};
template <>
struct Vector<double> {
    typedef double type __attribute__((vector_size(kBytes), may_alias));
};
template <class T>
constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));

// ---- arithmetic on [n, C] -------------------------------------------------------------------------------------------

// The Sylvester matrix of order 2^bits on 2^bits vectors that lie `stride` numbers apart.
template <class T, int bits>
inline void butterfly(T* x, int64_t stride) {
    using V = typename Vector<T>::type;
    constexpr int n = 1 << bits;
    V v[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) v[i] = *reinterpret_cast<const V*>(x + i * stride);
#pragma GCC unroll 4
    for (int b = 0; b < bits; ++b) {
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) {
            if (i >> b & 1) continue;
            const V low = v[i], high = v[i | 1 << b];
            v[i] = low + high;
            v[i | 1 << b] = low - high;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) *reinterpret_cast<V*>(x + i * stride) = v[i];
}

// Where the numbers of an array [n, inner, width] lie: `pitch` from one [width] to the next, width whole vectors.
//
// Butterflies reach over powers of two of rows. If these were powers of two of bytes, all of a butterfly's vectors would
// compete for the same few places of the cache, so panels have a pitch that is an odd number of vectors.
struct Layout {
    int64_t inner, width, pitch;
    Layout(int64_t i, int64_t w, int64_t p) : inner(p == w ? 1 : i), width(p == w ? i * w : w), pitch(p == w ? i * w : p) {}
    int64_t step() const { return inner * pitch; }  // along n
};

// [2^p, inner, width] along the first index. The inner parts first, each while it is in the cache.
template <class T>
void sylvester(T* x, int p, const Layout& at) {
    if (p == 0) return;
    const int passes = (p + kRadixBits - 1) / kRadixBits, bits = (p + passes - 1) / passes;
    const int64_t rows = int64_t(1) << (p - bits), stride = at.step() * rows;
    if (p > bits)
        for (int64_t i = 0; i < int64_t(1) << bits; ++i) sylvester(x + i * stride, p - bits, at);
    const bool whole = at.inner == 1 && at.pitch == at.width;
    const int64_t runs = whole ? 1 : rows * at.inner, length = whole ? rows * at.width : at.width;
    for (int64_t r = 0; r < runs; ++r) {
        for (int64_t j = r * at.pitch; j < r * at.pitch + length; j += kLanes<T>) {
            if (bits == 1) butterfly<T, 1>(x + j, stride);
            if (bits == 2) butterfly<T, 2>(x + j, stride);
            if (bits == 3) butterfly<T, 3>(x + j, stride);
            if (bits == 4) butterfly<T, 4>(x + j, stride);
        }
    }
}

// [k, length] times h along the first index: out[a] = Σ_c h[c, a] x[c], rows `stride` apart. k is a multiple of 4;
// `space` holds [k, 2 vectors].
template <class T>
void core(T* x, int64_t k, int64_t length, int64_t stride, const T* h, T* space) {
    using V = typename Vector<T>::type;
    V* const s = reinterpret_cast<V*>(space);
    for (int64_t j = 0; j < length; j += 2 * kLanes<T>) {
        const bool two = length - j > kLanes<T>;  // the length is whole vectors, maybe an odd number of them
        for (int64_t c = 0; c < k; ++c) {
            s[2 * c] = *reinterpret_cast<const V*>(x + c * stride + j);
            s[2 * c + 1] = two ? *reinterpret_cast<const V*>(x + c * stride + j + kLanes<T>) : s[2 * c];
        }
        for (int64_t a = 0; a < k; a += 4) {
            V sum[4][2] = {};
            for (int64_t c = 0; c < k; ++c) {
                const T* const row = h + c * k + a;
                const V left = s[2 * c], right = s[2 * c + 1];
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    sum[i][0] += left * row[i];
                    sum[i][1] += right * row[i];
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                T* const out = x + (a + i) * stride + j;
                *reinterpret_cast<V*>(out) = sum[i][0];
                if (two) *reinterpret_cast<V*>(out + kLanes<T>) = sum[i][1];
            }
        }
    }
}

// The butterflies inside a vector: with the neighbour at distance 1, 2, 4, ...
template <int distance, class V, std::size_t... I>
inline V swapped(V v, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(v, v, (static_cast<int>(I) ^ distance)...);
#else
    typedef std::conditional_t<sizeof(v[0]) == 4, int32_t, int64_t> Index __attribute__((vector_size(kBytes)));
    return __builtin_shuffle(v, Index{(static_cast<int>(I) ^ distance)...});
#endif
}

template <class T, int distance, std::size_t... I>
inline typename Vector<T>::type inside(typename Vector<T>::type v, std::index_sequence<I...> lanes) {
    if constexpr (distance < kLanes<T>) {
        const typename Vector<T>::type sign = {(I & distance ? T(-1) : T(1))...};
        return inside<T, 2 * distance>(v * sign + swapped<distance>(v, lanes), lanes);
    } else {
        return v;
    }
}

template <class T>
void inside_vectors(T* x, int64_t count) {
    using V = typename Vector<T>::type;
    for (int64_t j = 0; j < count; j += kLanes<T>) {
        V* const v = reinterpret_cast<V*>(x + j);
        *v = inside<T, 1>(*v, std::make_index_sequence<kLanes<T>>());
    }
}

// ---- one side of the product ----------------------------------------------------------------------------------------

int log2_of(int64_t x) {
    int bits = 0;
    while (x > 1) x >>= 1, ++bits;
    return bits;
}

}  // namespace

extern "C" struct Side {
    int64_t order;       // n; 1 is no Hadamard matrix
    int64_t core;        // k, n = k 2^p
    int64_t inner;       // entries between two neighbours of a block
    const int8_t* h;     // [k, k], or null for k = 1
    const double* pre;   // one number an entry, or null
    const double* post;
};

namespace {

template <class T>
struct Plan {
    int64_t n, k, inner;
    int p;
    std::vector<T> h, pre, post;  // an empty vector is ones
    T scale;

    Plan(const Side& side, int64_t length) : n(side.order), k(side.core), inner(side.inner), p(log2_of(n / k)) {
        scale = static_cast<T>(1 / std::sqrt(static_cast<double>(n)));
        if (side.h && k > 1) h.assign(side.h, side.h + k * k);
        if (side.pre) pre.assign(side.pre, side.pre + length);
        if (side.post) post.assign(side.post, side.post + length);
    }
    const T* before(int64_t at = 0) const { return pre.empty() ? nullptr : pre.data() + at; }
    const T* after(int64_t at = 0) const { return post.empty() ? nullptr : post.data() + at; }
    T before_one(int64_t i) const { return pre.empty() ? scale : scale * pre[i]; }
    T after_one(int64_t i) const { return post.empty() ? T(1) : post[i]; }
    int64_t block() const { return n * inner; }
    int64_t space() const { return k * 2 * kLanes<T>; }

    // [k 2^bits, inner, width] in place along the first index, without the scale.
    void panel(T* x, int bits, const Layout& at, T* space) const {
        const int64_t stride = at.step() << bits;
        for (int64_t c = 0; c < k; ++c) sylvester(x + c * stride, bits, at);
        if (k > 1 && at.width == at.pitch) core(x, k, stride, stride, h.data(), space);
        if (k > 1 && at.width != at.pitch)
            for (int64_t j = 0; j < stride; j += at.pitch) core(x + j, k, at.width, stride, h.data(), space);
    }
};

struct Matrix {
    const void* data;
    int type;
    int64_t stride;
};

struct Target {
    void* data;
    int type;
    int64_t stride;
};

template <class T>
class Transform {
  public:
    Transform(Matrix from, Target to, int64_t rows, int64_t cols, const Side& row, const Side& column, int threads)
        : from_(from), to_(to), rows_(rows), cols_(cols), row_(row, cols), column_(column, rows) {
        threads_ = static_cast<int>(std::clamp<int64_t>(rows * cols / kThread, 1, std::max(threads, 1)));
    }

    bool run() {
        if (column_.n == 1) return rows_only();
        if (row_.n == 1) return columns_only();
        return both();
    }

  private:
    enum class Way { kNone, kVectors, kPanels, kTransposed };

    Way way() const {
        if (row_.n == 1) return Way::kNone;
        if (row_.inner == 1 && (int64_t(1) << row_.p) >= kLanes<T>) return Way::kVectors;
        return row_.inner % kLanes<T> == 0 ? Way::kPanels : Way::kTransposed;
    }

    // One row in `x`, for the ways that take one.
    void transform_row(T* x, T* space) const {
        constexpr int lanes = kLanes<T>;
        if (way() == Way::kVectors) {
            inside_vectors(x, cols_);
            for (int64_t j = 0; j < cols_; j += row_.n) row_.panel(x + j, row_.p - log2_of(lanes), {1, lanes, lanes}, space);
        }
        if (way() == Way::kPanels)
            for (int64_t j = 0; j < cols_; j += row_.block()) row_.panel(x + j, row_.p, {1, row_.inner, row_.inner}, space);
    }

    // Rows first ... first + count, each put into a buffer by read(row, x) and taken by write(row, x).
    template <class Read, class Write>
    void row_side(int64_t first, int64_t count, T* space, const Read& read, const Write& write) const {
        constexpr int lanes = kLanes<T>;
        T* const x = space + row_.space();
        if (way() != Way::kTransposed) {
            for (int64_t i = first; i < first + count; ++i) {
                read(i, x);
                transform_row(x, space);
                write(i, x);
            }
            return;
        }
        T* const turned = x + round_up(cols_);
        for (int64_t i = first; i < first + count; i += lanes) {
            const int64_t now = std::min<int64_t>(lanes, first + count - i);
            if (now < lanes) std::fill(turned, turned + cols_ * lanes, T(0));
            for (int64_t r = 0; r < now; ++r) {
                read(i + r, x);
                for (int64_t j = 0; j < cols_; ++j) turned[j * lanes + r] = x[j];
            }
            for (int64_t j = 0; j < cols_; j += row_.block())
                row_.panel(turned + j * lanes, row_.p, {row_.inner, lanes, lanes}, space);
            for (int64_t r = 0; r < now; ++r) {
                for (int64_t j = 0; j < cols_; ++j) x[j] = turned[j * lanes + r];
                write(i + r, x);
            }
        }
    }

    static int64_t round_up(int64_t count) { return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }

    int64_t row_space() const {
        return row_.space() + round_up(cols_) * (way() == Way::kTransposed ? 1 + kLanes<T> : 1);
    }

    int64_t rows_a_task() const { return std::max<int64_t>(kLanes<T>, kTask / cols_ / kLanes<T> * kLanes<T>); }

    std::vector<Buffer<T>> buffers(int64_t count) const {
        std::vector<Buffer<T>> found;
        for (int i = 0; i < threads_; ++i) found.emplace_back(count);
        return found;
    }

    static bool missing(const std::vector<Buffer<T>>& all) {
        return std::any_of(all.begin(), all.end(), [](const Buffer<T>& b) { return b.get() == nullptr; });
    }

    bool rows_only() {
        const auto space = buffers(row_space());
        if (missing(space)) return false;
        const int64_t step = rows_a_task();
        parallel((rows_ + step - 1) / step, threads_, [&](int64_t task, int thread) {
            const auto read = [&](int64_t i, T* x) {
                const T factor = row_.scale * column_.before_one(i) * column_.after_one(i);
                load(from_.data, from_.type, i * from_.stride, 0, &factor, 1, cols_, row_.before(), x);
            };
            const auto write = [&](int64_t i, const T* x) {
                store(x, cols_, T(1), row_.after(), to_.data, to_.type, i * to_.stride);
            };
            row_side(task * step, std::min(step, rows_ - task * step), space[thread].get(), read, write);
        });
        return true;
    }

    // Columns of the matrix that are transformed together, for panels of so many rows.
    static int64_t panel_width(int64_t height) {
        int64_t width = 128;
        while (width > std::max<int64_t>(kLanes<T>, 32) && width * height * int64_t(sizeof(T)) > kPanelBytes) width /= 2;
        return width;
    }
    static int64_t odd_pitch(int64_t width) { return (width / kLanes<T> | 1) * kLanes<T>; }

    // The column side alone, or behind a diagonal row side: panel by panel, straight from the matrix.
    bool columns_only() {
        const int64_t height = column_.block(), width = panel_width(height), panels = (cols_ + width - 1) / width;
        const int64_t pitch = odd_pitch(width);
        const auto space = buffers(column_.space() + pitch * height);
        if (missing(space)) return false;
        parallel(rows_ / height * panels, threads_, [&](int64_t task, int thread) {
            const int64_t top = task / panels * height, left = task % panels * width, count = std::min(width, cols_ - left);
            const int64_t padded = round_up(count);
            T* const x = space[thread].get() + column_.space();
            for (int64_t i = 0; i < height; ++i) {
                const T factor = column_.before_one(top + i);
                load(from_.data, from_.type, (top + i) * from_.stride + left, 0, &factor, 1, count, row_.before(left),
                     x + i * pitch);
                std::fill(x + i * pitch + count, x + i * pitch + padded, T(0));
            }
            finish(x, space[thread].get(), column_.p, padded, pitch, left, count, top, 1, 0);
        });
        return true;
    }

    // The column side on a panel x [height, padded], whose rows then go to part `part` of the block that begins at `top`.
    void finish(T* x, T* space, int bits, int64_t padded, int64_t pitch, int64_t left, int64_t count, int64_t top,
                int64_t parts, int64_t part) const {
        column_.panel(x, bits, {column_.inner, padded, pitch}, space);
        const int64_t height = column_.block() / parts, middle = (column_.inner << column_.p) / parts;
        for (int64_t i = 0; i < height; ++i) {
            const int64_t row = top + (i / middle * parts + part) * middle + i % middle;
            store(x + i * pitch, count, column_.after_one(row), row_.after(left), to_.data, to_.type,
                  row * to_.stride + left);
        }
    }

    bool both() {
        const int64_t block = column_.block(), most = std::min<int64_t>(kMostParts, int64_t(1) << column_.p);
        int64_t parts = 1;
        while (parts < most && block / parts * cols_ > std::max(kSlab, rows_ * cols_ / kShare)) parts = parts == 1 ? 4 : 2 * parts;
        if (parts > most) parts = 1;
        const int64_t height = block / parts, middle = (column_.inner << column_.p) / parts, blocks = rows_ / block;
        const int64_t width = panel_width(height), panels = (cols_ + width - 1) / width;
        const int64_t pitch = odd_pitch(width);
        const int bits = column_.p - log2_of(parts);
        // Small blocks share a slab, so that there is enough to do between two waits. The slab lies panel by panel:
        // [blocks, panels, height, pitch], the last panel padded with zeros.
        const int64_t together = std::clamp<int64_t>(kSlab / (height * cols_), 1, blocks);
        const Buffer<T> slab(together * height * panels * pitch);
        const auto space = buffers(std::max(row_space(), column_.space()));
        if (!slab.get() || missing(space)) return false;
        const int64_t step = std::min(rows_a_task(), std::max<int64_t>(kLanes<T>, height));
        const auto panel = [&](int64_t b, int64_t index) { return slab.get() + (b * panels + index) * height * pitch; };
        for (int64_t first = 0; first < blocks; first += together) {
            const int64_t now = std::min(together, blocks - first), rows = now * height;
            for (int64_t part = 0; part < parts; ++part) {
                const auto read = [&](int64_t i, T* x) {  // the sum of `parts` rows, with the signs of this part
                    const int64_t b = i / height, j = i % height;
                    const int64_t top = (first + b) * block + j / middle * parts * middle + j % middle;
                    T factors[kMostParts];
                    for (int64_t m = 0; m < parts; ++m) {
                        const T sign = __builtin_parityll(static_cast<unsigned long long>(m & part)) ? T(-1) : T(1);
                        factors[m] = sign * row_.scale * column_.before_one(top + m * middle);
                    }
                    load(from_.data, from_.type, top * from_.stride, middle * from_.stride, factors, parts, cols_,
                         row_.before(), x);
                };
                const auto write = [&](int64_t i, const T* x) {
                    for (int64_t index = 0; index < panels; ++index) {
                        T* const to = panel(i / height, index) + i % height * pitch;
                        const int64_t count = std::min(width, cols_ - index * width);
                        std::copy(x + index * width, x + index * width + count, to);
                        std::fill(to + count, to + width, T(0));
                    }
                };
                parallel((rows + step - 1) / step, threads_, [&](int64_t task, int thread) {
                    row_side(task * step, std::min(step, rows - task * step), space[thread].get(), read, write);
                });
                parallel(now * panels, threads_, [&](int64_t task, int thread) {
                    const int64_t b = task / panels, index = task % panels, left = index * width;
                    finish(panel(b, index), space[thread].get(), bits, width, pitch, left, std::min(width, cols_ - left),
                           (first + b) * block, parts, part);
                });
            }
        }
        return true;
    }

    Matrix from_;
    Target to_;
    int64_t rows_, cols_;
    Plan<T> row_, column_;
    int threads_;
};

}  // namespace

// Returns 0, or 1 where memory ran out (`to` then holds nothing of use). Strides count entries; entries of a row are
// neighbours; `from` and `to` do not overlap. `wide` computes in float64, else in float32.
extern "C" int dlqc_fwht(const void* from, int from_type, int64_t from_stride, void* to, int to_type, int64_t to_stride,
                         int64_t rows, int64_t cols, const Side* row, const Side* column, int wide, int threads) {
    try {
        const Matrix source{from, from_type, from_stride};
        const Target target{to, to_type, to_stride};
        if (to_stride == cols) large_pages(to, rows * cols * (to_type == kFloat64 ? 8 : to_type == kFloat32 ? 4 : 2));
        const bool done = wide ? Transform<double>(source, target, rows, cols, *row, *column, threads).run()
                               : Transform<float>(source, target, rows, cols, *row, *column, threads).run();
        return done ? 0 : 1;
    } catch (const std::exception&) {
        return 1;
    }
}
