// Keys and values of a cache to packed codes and back; formats and formulas are those of `dlqc.kv_cache`, to the last bit.
//
// Sixteen rows at a time, one a lane: channels of a head that lie together (keys), or tokens, turned sixteen by sixteen (values).
// So a step, a center and a word of codes are each one vector for both.
//
//   step = half · 2^(1-b) · (1 + 2^-10) + 2^-24, rounded to float16 after each operation as torch does
//   code = floor((x - center) / step) + 2^(b-1)
//   x̂    = (code + ½ - 2^(b-1)) · step + center      the product has 20 bits, so it is exact with or without fma
#include <limits>

#include "threads.h"
#include "torch_op.h"

extern "C" {

// Numbers [B, H, S, D], features together, the other steps in elements; and how rows of them are stored.
struct Stored {
    void* numbers;
    int64_t batch, head, token;
    int64_t batches, heads, tokens, width;
    int32_t type;  // of the numbers: 0 float32, 1 bfloat16
    int32_t bits;  // 2, 3, 4 or 8
    int32_t keys;  // 1: a row is a channel of a head, 0: a token of it
    int32_t shared;  // 1: one center for each row, else one for each group
    int64_t group;  // numbers of a row that share a step; 32 divides it, or there is one group
    uint8_t* codes;  // [rows][4 · ⌈numbers of a row in whole groups · bits / 32⌉]
    uint16_t* steps;    // [rows][groups], float16
    uint16_t* centers;  // [rows][1 or groups], float16
};

}  // extern "C"

namespace {

constexpr uint16_t kNaN = 0x7e00;  // float16

// To nearest, ties to even.
uint16_t to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | kNaN);
    if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more
    if (bits < 0x38800000u) {                                               // below 2^-14: multiples of 2^-24
        float size;
        std::memcpy(&size, &bits, 4);
        const volatile float moved = size + 0.5f;  // one unit in the last place is 2^-24
        const float held = moved;
        std::memcpy(&bits, &held, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    }
    bits += 0xfffu + (bits >> 13 & 1u) - 0x38000000u;
    return static_cast<uint16_t>(sign | bits >> 13);
}

float from_half(uint16_t half) {
    const uint32_t size = half & 0x7fffu, sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    uint32_t bits = size << 13;
    if (size >= 0x7c00u) {
        bits += 0x70000000u;
    } else if (size >= 0x400u) {
        bits += 0x38000000u;
    } else {
        const float small = static_cast<float>(size) * 0x1p-24f;
        std::memcpy(&bits, &small, 4);
    }
    bits |= sign;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

struct Sizes {
    int64_t count, groups, rows, strips, words;  // numbers of a row, groups of it, rows of a head, sixteens of them, words of a row
    explicit Sizes(const Stored& s) {
        const int64_t length = s.keys ? s.tokens : s.width;
        groups = (length + s.group - 1) / s.group, count = groups * s.group;
        rows = s.keys ? s.width : s.tokens, strips = (rows + kLanes - 1) / kLanes;
        words = (count * s.bits + 31) / 32;
    }
};

// Sixteen rows, or as many as there are.
struct Strip {
    int64_t at, first, rows;  // where the head's numbers begin; rows from `first` on within the head
    int64_t row;              // of all heads
};

Strip strip_of(const Stored& s, const Sizes& sizes, int64_t task) {
    const int64_t head = task / sizes.strips, first = task % sizes.strips * kLanes;
    return {head / s.heads * s.batch + head % s.heads * s.head, first, std::min<int64_t>(kLanes, sizes.rows - first),
            head * sizes.rows + first};
}

// Numbers of a group, from number `start` of each row on, as [number][lane]. What is past the end repeats the last number.
template <class X>
void take(const Stored& s, const Strip& strip, int64_t start, float* to) {
    const X* const from = static_cast<const X*>(s.numbers) + strip.at;
    if (s.keys) {
        for (int64_t i = 0; i < s.group; ++i)
            store(to + i * kLanes, values(from + std::min(start + i, s.tokens - 1) * s.token, strip.first, s.width));
        return;
    }
    for (int64_t d = 0; d < s.width; d += kLanes) {
        Floats v[kLanes]{};
        for (int64_t r = 0; r < strip.rows; ++r) v[r] = values(from + (strip.first + r) * s.token, d, s.width);
        transpose(v);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, s.width - d); ++i) store(to + (d + i) * kLanes, v[i]);
    }
}

// Whole words of sixteen rows.
class Stream {
  public:
    Stream(const Stored& s, const Sizes& sizes, const Strip& strip)
        : to_(s.codes + strip.row * sizes.words * 4), pitch_(sizes.words * 4), rows_(strip.rows), bits_(s.bits) {}

    DLQC_INLINE void put(const Ints& code) {
        word_ |= (Words)code << used_;
        used_ += bits_;
        if (used_ < 32) return;
        flush();
        used_ -= 32;
        word_ = used_ ? (Words)code >> (bits_ - used_) : Words{};
    }
    void end() {
        if (used_) flush();
    }

    DLQC_INLINE Ints get() {
        if (!left_) fetch();
        Words code = word_;
        if (left_ >= bits_) {
            word_ >>= bits_, left_ -= bits_;
        } else {
            const int had = left_;
            fetch();
            code |= word_ << had;
            word_ >>= bits_ - had, left_ = 32 - (bits_ - had);
        }
        return (Ints)(code & ((1u << bits_) - 1));
    }

  private:
    void flush() {
        for (int64_t r = 0; r < rows_; ++r) {
            const uint32_t one = word_[r];
            std::memcpy(to_ + r * pitch_, &one, 4);
        }
        to_ += 4;
    }
    void fetch() {
        for (int64_t r = 0; r < rows_; ++r) {
            uint32_t one;
            std::memcpy(&one, to_ + r * pitch_, 4);
            word_[r] = one;
        }
        to_ += 4, left_ = 32;
    }

    uint8_t* to_;
    int64_t pitch_, rows_;
    Words word_{};
    int bits_, used_ = 0, left_ = 0;
};

Floats halves(const uint16_t* from, int64_t pitch, int64_t rows) {
    Floats found{};
    for (int64_t r = 0; r < rows; ++r) found[r] = from_half(from[r * pitch]);
    return found;
}

DLQC_INLINE Floats size_of(const Floats& v) { return (Floats)((Ints)v & 0x7fffffff); }

void quantize(const Stored& s, const Sizes& sizes, const Strip& strip, float* numbers) {
    Stream out(s, sizes, strip);
    const int32_t top = (1 << s.bits) - 1, middle = 1 << (s.bits - 1);
    const float part = 1.0f / static_cast<float>(middle);
    for (int64_t g = 0; g < sizes.groups; ++g) {
        if (s.type == kFloat32)
            take<float>(s, strip, g * s.group, numbers);
        else
            take<uint16_t>(s, strip, g * s.group, numbers);
        Floats least = load<Floats>(numbers), most = least;
        Ints lost = least != least;
        for (int64_t i = 1; i < s.group; ++i) {
            const Floats v = load<Floats>(numbers + i * kLanes);
            least = v < least ? v : least, most = v > most ? v : most, lost |= v != v;
        }
        const int64_t pitch = s.shared ? 1 : sizes.groups;
        uint16_t* const centers = s.centers + strip.row * pitch + (s.shared ? 0 : g);
        if (!s.shared) {
            const Floats between = least + (most - least) / 2.0f;
            for (int64_t r = 0; r < strip.rows; ++r) centers[r * pitch] = lost[r] ? kNaN : to_half(between[r]);
        }
        const Floats center = halves(centers, pitch, strip.rows);
        // Subtraction rounds monotonically, so the ends are the farthest after it, too.
        const Floats low = size_of(least - center), high = size_of(most - center), half = low > high ? low : high;
        Floats step{};
        uint16_t* const steps = s.steps + strip.row * sizes.groups + g;
        for (int64_t r = 0; r < strip.rows; ++r) {
            const volatile float grown = half[r] * part * (1 + 0x1p-10f);  // rounded before the sum
            uint16_t& held = steps[r * sizes.groups];
            held = half[r] == 0 ? 0 : to_half(grown + 0x1p-24f);
            if (lost[r]) held = kNaN;
            step[r] = from_half(held);
        }
        const Ints wide = step > 0.0f;
        const Floats divisor = wide ? step : all(1.0f);
        for (int64_t i = 0; i < s.group; ++i) {
            const Floats level = (load<Floats>(numbers + i * kLanes) - center) / divisor;
            Ints code = __builtin_convertvector(level, Ints);
            code += to_floats(code) > level;  // toward -inf
            code = (wide ? code : Ints{}) + middle;
            code = code < 0 ? Ints{} : code;
            code = code > top ? all(top) : code;
            out.put(code);
        }
    }
    out.end();
}

void dequantize(const Stored& s, const Sizes& sizes, const Strip& strip, float* numbers) {
    Stream in(s, sizes, strip);
    const float lowest = 0.5f - static_cast<float>(1 << (s.bits - 1));
    float* const to = static_cast<float*>(s.numbers) + strip.at;
    for (int64_t g = 0; g < sizes.groups; ++g) {
        const Floats step = halves(s.steps + strip.row * sizes.groups + g, sizes.groups, strip.rows);
        const int64_t pitch = s.shared ? 1 : sizes.groups;
        const Floats center = halves(s.centers + strip.row * pitch + (s.shared ? 0 : g), pitch, strip.rows);
        for (int64_t i = 0; i < s.group; ++i) {
            const Floats level = to_floats(in.get()) + lowest;
            store(numbers + i * kLanes, level * step + center);
        }
        if (s.keys) {
            const int64_t end = std::min(s.group, s.tokens - g * s.group);
            for (int64_t i = 0; i < end; ++i)
                std::memcpy(to + (g * s.group + i) * s.token + strip.first, numbers + i * kLanes, 4 * strip.rows);
            continue;
        }
        for (int64_t d = 0; d < s.width; d += kLanes) {
            Floats v[kLanes]{};
            const int64_t count = std::min<int64_t>(kLanes, s.width - d);
            for (int64_t i = 0; i < count; ++i) v[i] = load<Floats>(numbers + (d + i) * kLanes);
            transpose(v);
            for (int64_t r = 0; r < strip.rows; ++r) std::memcpy(to + (strip.first + r) * s.token + d, &v[r], 4 * count);
        }
    }
}

thread_local Scratch of_thread;

}  // namespace

extern "C" {

int dlqc_isa() { return DLQC_ISA; }

// Numbers to codes, steps and (unless they are shared: then they are given) centers; or back, to float32. Numbers that are no
// numbers, or too far apart for float16, make steps that are not finite. Returns 0, or 1 if there is no memory.
int dlqc_cache(const Stored* stored, int back, int threads, Team team) {
    const Stored& s = *stored;
    const Sizes sizes(s);
    const int64_t tasks = s.batches * s.heads * sizes.strips;
    const size_t bytes = rounded(4 * s.group * kLanes);
    if (!of_thread.get(bytes)) return 1;
    const int enough = static_cast<int>(std::min<int64_t>(threads, tasks * kLanes * sizes.count >> 16));
    share(enough, team, tasks, [&] { return of_thread.get(bytes); }, [&](int64_t task, char* space) {
        const Strip strip = strip_of(s, sizes, task);
        float* const numbers = reinterpret_cast<float*>(space);
        back ? dequantize(s, sizes, strip, numbers) : quantize(s, sizes, strip, numbers);
    });
    return 0;
}

}  // extern "C"

namespace {

// Whether there is such a cache: its widths, and groups that fill words.
bool stored_so(const Stored& s) {
    if (s.bits != 2 && s.bits != 3 && s.bits != 4 && s.bits != 8) return false;
    if (s.batches < 1 || s.heads < 1 || s.tokens < 1 || s.width < 1 || s.group < 1) return false;
    return s.group % 32 == 0 || s.group == (s.keys ? s.tokens : s.width);
}

Tensor table(int64_t rows, int64_t columns, int32_t dtype) {
    const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
    return Tensor::empty(2, sizes, strides, dtype);
}

void run(const Stored& s, int back) {
    if (dlqc_cache(&s, back, torch_threads(), torch_team)) throw std::runtime_error("no memory for a group of a cache");
}

}  // namespace

extern "C" {

void dlqc_op_quantize_cache(uint64_t* stack, uint64_t, uint64_t) {
    Arguments args(stack);
    Tensor x = args.tensor(), given = args.optional();
    const int64_t bits = args.integer(), group = args.integer();
    const bool keys = args.boolean();
    if (x.dim == 4 && x.type() >= 0 && (x.size(3) == 1 || x.stride(3) == 1)) {
        Stored s{x.data, x.stride(0), x.stride(1), x.stride(2), x.size(0), x.size(1), x.size(2), x.size(3), x.type(),
                 static_cast<int32_t>(bits), keys, static_cast<bool>(given), keys ? std::min(group, x.size(2)) : x.size(3),
                 nullptr, nullptr, nullptr};
        const int64_t rows = s.batches * s.heads * (keys ? s.width : s.tokens);
        if (stored_so(s) && (!given || (keys && given.holds(torch.float16, rows)))) {
            const Sizes sizes(s);
            Tensor codes = table(rows, 4 * sizes.words, torch.uint8), steps = table(rows, sizes.groups, torch.float16);
            Tensor centers = table(rows, given ? 1 : sizes.groups, torch.float16);
            if (given) std::memcpy(centers.data, given.data, 2 * rows);
            s.codes = codes.as<uint8_t>(), s.steps = steps.as<uint16_t>(), s.centers = centers.as<uint16_t>();
            run(s, 0);
            stack[0] = word(codes.release()), stack[1] = word(steps.release()), stack[2] = word(centers.release());
            return;
        }
    }
    Refill words(stack);
    (words << x).optional(given) << bits << group << static_cast<int64_t>(keys);
    words.call("dlqc_cpu::quantize_cache_in_python");
}

void dlqc_op_dequantize_cache(uint64_t* stack, uint64_t, uint64_t) {
    Arguments args(stack);
    Tensor codes = args.tensor(), steps = args.tensor(), centers = args.tensor();
    const int64_t heads = args.integer(), tokens = args.integer(), width = args.integer();
    const int64_t bits = args.integer(), group = args.integer();
    const bool keys = args.boolean();
    const int64_t per_head = keys ? width : tokens, rows = steps.dim ? steps.size(0) : 0;
    if (steps.dim == 2 && centers.dim == 2 && heads > 0 && per_head > 0 && rows % (heads * per_head) == 0) {
        const int64_t columns = centers.size(1), batches = rows / (heads * per_head);
        Stored s{nullptr, heads * tokens * width, tokens * width, width, batches, heads, tokens, width, kFloat32,
                 static_cast<int32_t>(bits), keys, columns == 1, keys ? std::min(group, tokens) : width, codes.as<uint8_t>(),
                 steps.as<uint16_t>(), centers.as<uint16_t>()};
        if (stored_so(s)) {
            const Sizes sizes(s);
            if (codes.holds(torch.uint8, rows * 4 * sizes.words) && steps.holds(torch.float16, rows * sizes.groups) &&
                (columns == 1 || columns == sizes.groups) && centers.holds(torch.float16, rows * columns)) {
                const int64_t shape[] = {batches, heads, tokens, width}, pitches[] = {s.batch, s.head, s.token, 1};
                Tensor y = Tensor::empty(4, shape, pitches, torch.float32);
                s.numbers = y.data;
                run(s, 1);
                *stack = word(y.release());
                return;
            }
        }
    }
    Refill words(stack);
    words << codes << steps << centers << heads << tokens << width << bits << group << static_cast<int64_t>(keys);
    words.call("dlqc_cpu::dequantize_cache_in_python");
}

}  // extern "C"
