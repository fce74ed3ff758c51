// Products of some rows of inputs with some rows of a weight of codes. Knows no threads and not how its work is shared.
//
// Inputs are rounded to 16 bits with a scale for every group of columns, so that a group's product is a sum of
// integers, exact in any order: a row's result has the same bits whatever rows are beside it. 8 bits would be half the
// work for many rows, and are not enough: a model's logits are then 3 % off, and other tokens the likeliest.

#pragma once

#include <vector>

#include "lanes.h"

namespace {

#if WIDE

inline Ints low_bytes(Ints a) { return _mm512_and_si512(a, _mm512_set1_epi16(255)); }
inline Ints high_bytes(Ints a) { return _mm512_srli_epi16(a, 8); }
template <int AT>
inline Ints nibbles(Ints a) {
    const Ints shifted = _mm512_srli_epi16(a, 4 * AT);
    return AT == 3 ? shifted : _mm512_and_si512(shifted, _mm512_set1_epi16(15));
}
// Written out: the compiler would load the two inputs into a register first, for another instruction each.
inline Ints dot(Ints sums, Ints codes, const int16_t* two_inputs) {
    asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(codes), "m"(*(const int32_t*)two_inputs));
    return sums;
}
inline __m256i as_words(Floats a) { return _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a)); }

constexpr int MOST_ROWS = 8;  // of 32 registers 16 are sums; 12 rows are no faster

#else

inline Ints low_bytes(Ints x) {
    const __m256i mask = _mm256_set1_epi16(255);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Ints high_bytes(Ints x) { return {_mm256_srli_epi16(x.a, 8), _mm256_srli_epi16(x.b, 8)}; }
template <int AT>
inline Ints nibbles(Ints x) {
    const Ints shifted = {_mm256_srli_epi16(x.a, 4 * AT), _mm256_srli_epi16(x.b, 4 * AT)};
    const __m256i mask = _mm256_set1_epi16(15);
    return AT == 3 ? shifted : Ints{_mm256_and_si256(shifted.a, mask), _mm256_and_si256(shifted.b, mask)};
}
inline Ints dot(Ints sums, Ints codes, const int16_t* two_inputs) {
    int32_t both;
    std::memcpy(&both, two_inputs, 4);
    const __m256i inputs = _mm256_set1_epi32(both);
    return {_mm256_add_epi32(sums.a, _mm256_madd_epi16(codes.a, inputs)),
            _mm256_add_epi32(sums.b, _mm256_madd_epi16(codes.b, inputs))};
}
inline __m256i as_words(Floats x) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
}

constexpr int MOST_ROWS = 3;  // a block is two of 16 registers

#endif

constexpr int64_t TALLEST = 12 * MOST_ROWS;  // rows of inputs that stay in the second cache

// Inputs as 16-bit codes, of each four columns the first, third, second and fourth: codes of a weight are bytes, whose
// lower and upper halves of 16 bits are such pairs. Of each row and group also the scale, scale · the codes' sum, and
// what to start from: a weight's codes are unsigned, and what that adds, `zero` times the inputs, is taken off first.
// `tall` rows at a time, group by group, so that a tile's rows are beside each other: one register points at all.
struct Inputs {
    int64_t groups, tall;
    int32_t zero;
    std::vector<int16_t> codes;
    std::vector<float> scale, shifted;
    std::vector<int32_t> start;

    int64_t place(int64_t row, int64_t group) const { return (row / tall * groups + group) * tall + row % tall; }

    void resize(int64_t rows, int64_t of_groups, int32_t of_zero) {
        groups = of_groups;
        zero = of_zero;
        tall = std::min(rows, TALLEST);
        const size_t count = (rows + tall - 1) / tall * tall * groups;
        if (scale.size() >= count) return;
        codes.resize(count * GROUP);
        scale.resize(count);
        shifted.resize(count);
        start.resize(count);
    }
};

inline void store_paired(int16_t* at, Floats a) {
    constexpr int ORDER = 0xd8;  // 0, 2, 1, 3
    const __m256i words = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(as_words(a), ORDER), ORDER);
    _mm256_storeu_si256((__m256i*)at, words);
}

void quantise_row(const float* from, int64_t row, Inputs& into) {
    constexpr float LARGEST = 32767.0f;
    for (int64_t group = 0; group < into.groups; group++) {
        const int64_t place = into.place(row, group);
        const Floats a = load(from + group * GROUP), b = load(from + group * GROUP + LANES);
        const float most = largest(larger(magnitude(a), magnitude(b)));
        // 0 · x is not 0 where x is no number, and then the product must not be one either: `largest` may not see it.
        const float broken = sum(multiply(add(a, b), all(0.0f)));
        const bool some = most > 1e-30f;
        const Floats inverse = all(some ? LARGEST / most : 0.0f);
        const Floats codes_a = nearest(multiply(a, inverse)), codes_b = nearest(multiply(b, inverse));
        int16_t* codes = into.codes.data() + place * GROUP;
        store_paired(codes, codes_a);
        store_paired(codes + LANES, codes_b);
        const float scale = (some ? most / LARGEST : 0.0f) + broken, total = sum(add(codes_a, codes_b));
        into.scale[place] = scale;
        into.shifted[place] = scale * total;
        into.start[place] = std::isfinite(total) ? -into.zero * (int32_t)total : 0;
    }
}

struct Product {
    const uint8_t* codes;   // [blocks, groups, 4 or 8, 64]: sixteen rows' four columns, one or two nibbles a byte
    const uint16_t* scale;  // [blocks, groups, 16], float16
    const uint16_t* base;   // the same, or null: of each weight of the group, added
    float gain;             // of the scales and bases
    const float* bias;      // [rows of the weight] or null
    int64_t groups, outputs;
    const Inputs* inputs;
    float* out;
    int64_t stride;  // between rows of `out`
};

// Some rows of inputs by a block of the weight, all of whose sums are in registers. One block and not several: its
// codes are then one stream from memory, which few rows wait for.
template <int BITS, bool BASE, int ROWS>
void tile(const Product& p, int64_t row, int64_t block) {
    constexpr int STEP = BITS * GROUP * LANES / 8;  // bytes of a group of a block
    Floats sums[ROWS];
    for (int r = 0; r < ROWS; r++) sums[r] = all(0.0f);
    const int64_t first = p.inputs->place(row, 0), tall = p.inputs->tall;
    const int16_t* inputs = p.inputs->codes.data() + first * GROUP;
    const float* scales = p.inputs->scale.data() + first;
    const float* shifted = p.inputs->shifted.data() + first;
    const int32_t* start = p.inputs->start.data() + first;
    const uint8_t* codes = p.codes + block * p.groups * STEP;
    const uint16_t* scale = p.scale + block * p.groups * LANES;
    const uint16_t* base = BASE ? p.base + block * p.groups * LANES : nullptr;
    for (int64_t group = 0; group < p.groups; group++) {
        Ints dots[ROWS];
        for (int r = 0; r < ROWS; r++) dots[r] = all(start[r]);
        const auto take = [&](Ints pairs, int column) {
            for (int r = 0; r < ROWS; r++) dots[r] = dot(dots[r], pairs, inputs + r * GROUP + column);
        };
#pragma GCC unroll 8
        for (int part = 0; part < BITS; part++) {
            const Ints bytes = load_bytes(codes + part * 64);
            if (BITS == 4) {
                take(nibbles<0>(bytes), part * 4);
                take(nibbles<2>(bytes), part * 4 + 2);
                take(nibbles<1>(bytes), part * 4 + GROUP / 2);
                take(nibbles<3>(bytes), part * 4 + GROUP / 2 + 2);
            } else {
                take(low_bytes(bytes), part * 4);
                take(high_bytes(bytes), part * 4 + 2);
            }
        }
        const Floats factor = half(scale);
        for (int r = 0; r < ROWS; r++) sums[r] = fused(floats(dots[r]), multiply(factor, all(scales[r])), sums[r]);
        if (BASE) {
            const Floats added = half(base);
            for (int r = 0; r < ROWS; r++) sums[r] = fused(added, all(shifted[r]), sums[r]);
            base += LANES;
        }
        codes += STEP, scale += LANES;
        inputs += tall * GROUP, scales += tall, shifted += tall, start += tall;
    }
    const int64_t output = block * LANES, left = p.outputs - output;
    for (int r = 0; r < ROWS; r++) {
        float found[LANES];
        store(found, multiply(sums[r], all(p.gain)));
        if (p.bias)
            for (int lane = 0; lane < LANES && lane < left; lane++) found[lane] += p.bias[output + lane];
        std::memcpy(p.out + (row + r) * p.stride + output, found, sizeof(float) * std::min<int64_t>(left, LANES));
    }
}

using Tile = void (*)(const Product&, int64_t, int64_t);

template <int BITS, bool BASE>
Tile tile_of(int rows) {
    switch (rows) {
        case 1: return tile<BITS, BASE, 1>;
        case 2: return tile<BITS, BASE, 2>;
#if WIDE
        case 4: return tile<BITS, BASE, 4>;
        case 5: return tile<BITS, BASE, 5>;
        case 6: return tile<BITS, BASE, 6>;
        case 7: return tile<BITS, BASE, 7>;
        case 8: return tile<BITS, BASE, 8>;
#endif
        default: return tile<BITS, BASE, 3>;
    }
}

Tile tile_of(int bits, bool base, int rows) {
    if (bits == 4) return base ? tile_of<4, true>(rows) : tile_of<4, false>(rows);
    return base ? tile_of<8, true>(rows) : tile_of<8, false>(rows);
}

// Rows first … last by blocks begin … end: blocks outermost, whose codes stay in cache.
void area(const Product& p, int bits, int64_t first, int64_t last, int64_t begin, int64_t end) {
    const int64_t tiles = (last - first + MOST_ROWS - 1) / MOST_ROWS;  // of nearly equal heights
    for (int64_t block = begin; block < end; block++) {
        for (int64_t at = 0; at < tiles; at++) {
            const int64_t from = first + (last - first) * at / tiles, to = first + (last - first) * (at + 1) / tiles;
            tile_of(bits, p.base != nullptr, (int)(to - from))(p, from, block);
        }
    }
}

}  // namespace
