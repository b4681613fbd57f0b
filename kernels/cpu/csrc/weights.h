// How a weight lies in memory: one layout for all regimes and instruction sets.
//
// Letters: N output features, K input features, b bits a code. Columns of the product (rows of W) come in strips of 16, strips
// in panels of 3, input features in blocks of 32, a block in 8 steps of 4.
//
//   codes    [panel][block][strip][b][64 bytes]: unsigned. Spread out, a step of a strip is 64 bytes: byte 4·n + j is input
//            feature j of column n, as vpdpbusd takes it.
//              8 bits  vector i is step i
//              4 bits  vector i holds step 2i in its lower and step 2i + 1 in its upper halves of bytes
//              2 bits  vector i holds step 4i + j at bit 2j of each byte
//              3 bits  vectors 0 and 1 hold the two lower bits likewise, vector 2 the upper bit of step j at bit j
//   scales   [panel][group][strip][16], float32 or bfloat16
//   zeros    [panel][group][strip][16], one byte each, or null: 2^(b-1) everywhere
//
// N is padded to whole panels, K to whole blocks; scales are 0 past N, activations past K.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace {

constexpr int64_t kBlock = 32, kStep = 4, kSteps = 8, kStrip = 16, kStrips = 3, kPanel = kStrip * kStrips;

}  // namespace

extern "C" {

enum : int32_t { kIntegers = 0, kTable = 1, kTables = 2, kPlanes = 3 };

struct Weight {
    int64_t n, k;
    int64_t group;  // input features that share a scale; K for one scale a channel
    const uint8_t* codes;
    const void* scales;
    const uint8_t* zeros;
    const float* bias;   // or null
    int32_t bits;
    int32_t half_scales;  // 1: bfloat16
    // Formats that are not integers (linear16.cpp):
    int32_t kind;
    const float* table;    // kTable: 16 values; kTables: [panel][group][2^bits][48]
    const float* rows;     // kPlanes: [panel][plane][48]
    const float* columns;  // kPlanes: [plane][group size]
    const int32_t* first;  // kPlanes: [groups + 1], the first plane of each group
};

}  // extern "C"

namespace {

// Where things are in a weight.
struct Place {
    int64_t blocks, groups, panels;
    explicit Place(const Weight& w)
        : blocks((w.k + kBlock - 1) / kBlock), groups((w.k + w.group - 1) / w.group), panels((w.n + kPanel - 1) / kPanel) {}
    int64_t codes_at(int64_t panel, int bits) const { return panel * blocks * kStrips * bits * 64; }
    int64_t scales_at(int64_t panel) const { return panel * groups * kPanel; }
};

// Step j of a block of one strip, spread out to one code a byte.
template <int kBits>
DLQC_INLINE Bytes spread(const uint8_t* block, int j) {
    if constexpr (kBits == 8) {
        return load<Bytes>(block + 64 * j);
    } else if constexpr (kBits == 4) {
        const Words v = load<Words>(block + 64 * (j / 2));
        return (Bytes)((j % 2 ? v >> 4 : v) & 0x0f0f0f0fu);
    } else {
        const Words v = load<Words>(block + 64 * (j / 4));
        const Words low = (v >> (2 * (j % 4))) & 0x03030303u;
        if constexpr (kBits == 2) return (Bytes)low;
        const Words h = load<Words>(block + 128);
        return (Bytes)(low | ((j < 2 ? h << (2 - j) : h >> (j - 2)) & 0x04040404u));
    }
}

// Codes [N, K], one byte each, into the layout above. `to` holds zeros.
inline void arrange(const uint8_t* codes, int64_t n, int64_t k, int bits, uint8_t* to) {
    const Weight w{n, k, k, nullptr, nullptr, nullptr, nullptr, bits, 0, 0, nullptr, nullptr, nullptr, nullptr};
    const Place place(w);
    for (int64_t row = 0; row < n; ++row) {
        const int64_t panel = row / kPanel, strip = row % kPanel / kStrip, lane = row % kStrip;
        const int64_t pitch = kStrips * bits * 64;
        uint8_t* const base = to + place.codes_at(panel, bits) + strip * bits * 64 + lane * 4;
        const uint8_t* const from = codes + row * k;
        for (int64_t i = 0; i < k; ++i) {
            uint8_t* const block = base + i / kBlock * pitch + i % kStep;
            const int step = static_cast<int>(i % kBlock / kStep), code = from[i];
            if (bits == 8) {
                block[64 * step] = static_cast<uint8_t>(code);
            } else if (bits == 4) {
                block[64 * (step / 2)] |= static_cast<uint8_t>(code << (4 * (step % 2)));
            } else {
                block[64 * (step / 4)] |= static_cast<uint8_t>((code & 3) << (2 * (step % 4)));
                if (bits == 3) block[128] |= static_cast<uint8_t>((code >> 2) << step);
            }
        }
    }
}

}  // namespace
