// Products of inputs with quantised weights. Plain C functions on plain pointers: knows no torch and no model.
//
// A row's result has the same bits whatever rows are beside it and however many threads compute them: the product of
// a group of columns is a sum of integers, exact in any order, and the groups are summed in the order of the columns.

#include <vector>

#include "crew.h"
#include "lanes.h"

namespace {

constexpr int64_t TALLEST = 16 * MOST_ROWS;  // rows of inputs that stay in the second cache

// A few of a row's numbers are far larger than the others, and would take the scale of their group for themselves. Four
// beside each other with one larger than this many times the mean of the groups' largest have two codes each: one with
// a scale of its own, and in their group one of what that leaves. A quarter of the groups has one such four.
constexpr float LARGE = 1.2f;
constexpr int64_t MOST_LARGE = 7;  // for each group: fewer than 1 / LARGE of the groups have any, at most all 8 of theirs

struct Four {
    int32_t group, part;  // which of the group's four columns: 0 … 7
    int32_t codes, sum;
    float scale;
};

// Inputs as 8-bit codes: of each row and group the codes, the scale, their sum, and scale · sum. `tall` rows at a time,
// group by group, so that a tile's rows are beside each other: one register points at all of them. And each row's
// large ones, whose part of scale · sum is in their group's.
struct Inputs {
    int64_t groups, tall;
    std::vector<int8_t> codes;
    std::vector<float> scale, shifted;
    std::vector<int32_t> sums;
    std::vector<Four> large;
    std::vector<int32_t> larges;  // how many, of each row

    int64_t place(int64_t row, int64_t group) const { return (row / tall * groups + group) * tall + row % tall; }
    const Four* large_of(int64_t row) const { return large.data() + row * groups * MOST_LARGE; }

    void resize(int64_t rows, int64_t of_groups) {
        groups = of_groups;
        tall = std::min(rows, TALLEST);
        const size_t count = (rows + tall - 1) / tall * tall * groups;
        if (larges.size() < (size_t)rows) larges.resize(rows);
        if (scale.size() >= count) return;
        large.resize(count * MOST_LARGE);
        codes.resize(count * GROUP);
        scale.resize(count);
        shifted.resize(count);
        sums.resize(count);
    }
};

// What is not above `limit` of two sixteens, as those above leave it: their codes go to `into`. Adds to `shifted`.
int64_t take_large(Floats& a, Floats& b, float limit, int32_t group, Four* into, float& shifted) {
    const Floats most_a = largest_of_fours(magnitude(a)), most_b = largest_of_fours(magnitude(b));
    int8_t codes[GROUP];
    float most[GROUP];
    const auto split = [&](Floats& numbers, Floats of, int at) {
        const Floats found = where_above(of, limit, nearest(multiply(numbers, divide(all(127.0f), of))));
        numbers = fused(found, divide(of, all(-127.0f)), numbers);
        store_as_bytes(codes + at, found);
        store(most + at, of);
    };
    split(a, most_a, 0);
    split(b, most_b, LANES);
    int64_t count = 0;
    for (int32_t part = 0; part < GROUP / 4; part++) {
        if (!(most[4 * part] > limit)) continue;
        const int8_t* at = codes + 4 * part;
        const int32_t sum = at[0] + at[1] + at[2] + at[3];
        const float scale = most[4 * part] / 127.0f;
        into[count++] = {group, part, four(at), sum, scale};
        shifted += scale * (float)sum;
    }
    return count;
}

void quantise_row(const float* from, int64_t row, Inputs& into) {
    float total_most = 0.0f;
    for (int64_t group = 0; group < into.groups; group++) {
        const Floats a = load(from + group * GROUP), b = load(from + group * GROUP + LANES);
        const float most = largest(larger(magnitude(a), magnitude(b)));
        into.scale[into.place(row, group)] = most;
        total_most += most;
    }
    const float limit = LARGE * total_most / (float)into.groups;
    Four* large = into.large.data() + row * into.groups * MOST_LARGE;
    int64_t larges = 0;
    for (int64_t group = 0; group < into.groups; group++) {
        const int64_t place = into.place(row, group);
        Floats a = load(from + group * GROUP), b = load(from + group * GROUP + LANES);
        // 0 · x is not 0 where x is no number, and then the product must not be one either: `largest` may not see it.
        const float broken = sum(multiply(add(a, b), all(0.0f)));
        float most = into.scale[place], shifted = 0.0f;
        if (most > limit && most > 1e-30f) {
            larges += take_large(a, b, limit, (int32_t)group, large + larges, shifted);
            most = largest(larger(magnitude(a), magnitude(b)));
        }
        const bool some = most > 1e-30f;
        const Floats inverse = all(some ? 127.0f / most : 0.0f);
        const Floats codes_a = nearest(multiply(a, inverse)), codes_b = nearest(multiply(b, inverse));
        int8_t* codes = into.codes.data() + place * GROUP;
        store_as_bytes(codes, codes_a);
        store_as_bytes(codes + LANES, codes_b);
        const float scale = (some ? most / 127.0f : 0.0f) + broken, total = sum(add(codes_a, codes_b));
        into.scale[place] = scale;
        into.shifted[place] = scale * total + shifted;
        into.sums[place] = std::isfinite(total) ? (int32_t)total : 0;
    }
    into.larges[row] = (int32_t)larges;
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

// One row's sums, and what its large inputs add, to `out`.
template <int BITS, int BLOCKS>
void finish(const Product& p, int64_t row, int64_t block, float (*found)[LANES]) {
    constexpr int STEP = BITS * GROUP * LANES / 8;
    Floats sums[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) sums[b] = load(found[b]);
    const Four* large = p.inputs->large_of(row);
    for (const Four* end = large + p.inputs->larges[row]; large < end; large++) {
        const Floats scale = all(large->scale);
        for (int b = 0; b < BLOCKS; b++) {
            const int64_t place = (block + b) * p.groups + large->group;
            const Ints stored = load_bytes(p.codes + place * STEP + large->part % BITS * 64);
            const Ints codes = BITS == 4 ? nibbles(stored, large->part) : prepared<BITS>(stored);
            const Ints dots = dot<BITS>(start<BITS>(large->sum), codes, large->codes);
            sums[b] = fused(floats(dots), multiply(half(p.scale + place * LANES), scale), sums[b]);
        }
    }
    for (int b = 0; b < BLOCKS; b++) {
        const int64_t output = (block + b) * LANES, left = p.outputs - output;
        store(found[b], multiply(sums[b], all(p.gain)));
        if (p.bias)
            for (int lane = 0; lane < LANES && lane < left; lane++) found[b][lane] += p.bias[output + lane];
        std::memcpy(p.out + row * p.stride + output, found[b], sizeof(float) * std::min<int64_t>(left, LANES));
    }
}

// Some rows of inputs by some blocks of the weight, all of whose sums are in registers.
template <int BITS, bool BASE, int ROWS, int BLOCKS>
void tile(const Product& p, int64_t row, int64_t block) {
    constexpr int STEP = BITS * GROUP * LANES / 8;  // bytes of a group of a block
    Floats sums[ROWS][BLOCKS];
    for (int r = 0; r < ROWS; r++)
        for (int b = 0; b < BLOCKS; b++) sums[r][b] = all(0.0f);
    const int64_t first = p.inputs->place(row, 0), tall = p.inputs->tall;
    const int8_t* inputs = p.inputs->codes.data() + first * GROUP;
    const float* scales = p.inputs->scale.data() + first;
    const float* shifted = p.inputs->shifted.data() + first;
    const int32_t* totals = p.inputs->sums.data() + first;
    const uint8_t* codes = p.codes + block * p.groups * STEP;
    const uint16_t* scale = p.scale + block * p.groups * LANES;
    const uint16_t* base = BASE ? p.base + block * p.groups * LANES : nullptr;
    for (int64_t group = 0; group < p.groups; group++) {
        Ints dots[ROWS][BLOCKS];
        for (int r = 0; r < ROWS; r++)
            for (int b = 0; b < BLOCKS; b++) dots[r][b] = start<BITS>(totals[r]);
#pragma GCC unroll 8
        for (int part = 0; part < BITS; part++) {
            for (int b = 0; b < BLOCKS; b++) {
                const Ints both = load_bytes(codes + (b * p.groups + group) * STEP + part * 64);
                if (BITS == 4) {
                    const Ints low = low_nibbles(both), high = high_nibbles(both);
                    for (int r = 0; r < ROWS; r++) {
                        const int8_t* at = inputs + r * GROUP + part * 4;
                        dots[r][b] = dot<BITS>(dots[r][b], low, four(at));
                        dots[r][b] = dot<BITS>(dots[r][b], high, four(at + GROUP / 2));
                    }
                } else {
                    const Ints whole = prepared<BITS>(both);
                    for (int r = 0; r < ROWS; r++)
                        dots[r][b] = dot<BITS>(dots[r][b], whole, four(inputs + r * GROUP + part * 4));
                }
            }
        }
        for (int b = 0; b < BLOCKS; b++) {
            const Floats factor = half(scale + (b * p.groups + group) * LANES);
            for (int r = 0; r < ROWS; r++)
                sums[r][b] = fused(floats(dots[r][b]), multiply(factor, all(scales[r])), sums[r][b]);
            if (BASE) {
                const Floats added = half(base + (b * p.groups + group) * LANES);
                for (int r = 0; r < ROWS; r++)
                    sums[r][b] = fused(added, all(shifted[r]), sums[r][b]);
            }
        }
        inputs += tall * GROUP, scales += tall, shifted += tall, totals += tall;
    }
    alignas(64) float found[ROWS][BLOCKS][LANES];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
        for (int b = 0; b < BLOCKS; b++) store(found[r][b], sums[r][b]);
    for (int r = 0; r < ROWS; r++) finish<BITS, BLOCKS>(p, row + r, block, found[r]);
}

using Tile = void (*)(const Product&, int64_t, int64_t);

template <int BITS, bool BASE, int ROWS>
Tile tile_of(int blocks) {
#if WIDE
    if (ROWS <= 2 && blocks == 4) return tile<BITS, BASE, ROWS, ROWS <= 2 ? 4 : 1>;
    if (blocks == 2) return tile<BITS, BASE, ROWS, 2>;
#endif
    return tile<BITS, BASE, ROWS, 1>;
}

template <int BITS, bool BASE>
Tile tile_of(int rows, int blocks) {
    switch (rows) {
        case 1: return tile_of<BITS, BASE, 1>(blocks);
        case 2: return tile_of<BITS, BASE, 2>(blocks);
#if WIDE
        case 4: return tile_of<BITS, BASE, 4>(blocks);
        case 5: return tile_of<BITS, BASE, 5>(blocks);
        case 6: return tile_of<BITS, BASE, 6>(blocks);
#endif
        default: return tile_of<BITS, BASE, 3>(blocks);
    }
}

Tile tile_of(int bits, bool base, int rows, int blocks) {
    if (bits == 4) return base ? tile_of<4, true>(rows, blocks) : tile_of<4, false>(rows, blocks);
    return base ? tile_of<8, true>(rows, blocks) : tile_of<8, false>(rows, blocks);
}

// Rows first … last by blocks begin … end: as large tiles as there are, blocks outermost, whose codes stay in cache.
void area(const Product& p, int bits, int64_t first, int64_t last, int64_t begin, int64_t end) {
    const int64_t tiles = (last - first + MOST_ROWS - 1) / MOST_ROWS;  // of nearly equal heights
    const int widest = WIDE && last - first <= 2 ? 4 : MOST_BLOCKS;
    for (int64_t block = begin; block < end;) {
        int blocks = widest;
        while (blocks > end - block) blocks /= 2;
        for (int64_t at = 0; at < tiles; at++) {
            const int64_t from = first + (last - first) * at / tiles, to = first + (last - first) * (at + 1) / tiles;
            tile_of(bits, p.base != nullptr, (int)(to - from), blocks)(p, from, block);
        }
        block += blocks;
    }
}

}  // namespace

extern "C" {

// The version of what follows: a caller refuses another.
int64_t triptych_kernels() { return 1; }

// 1: AVX-512 with VNNI; 0: AVX2.
int64_t triptych_wide() { return WIDE; }

// out [rows, outputs] = inputs [rows, 32 · groups] · weightᵀ + bias, all float32.
void triptych_linear(const float* inputs, int64_t rows, int64_t input_stride, const uint8_t* codes,
                     const uint16_t* scale, const uint16_t* base, float gain, const float* bias, int64_t bits,
                     int64_t groups, int64_t outputs, float* out, int64_t out_stride, int64_t threads) {
    if (rows <= 0) return;
    static thread_local Inputs kept;
    Inputs& quantised = kept;
    quantised.resize(rows, groups);
    const auto quantise = [&](int64_t row) {
        quantise_row(inputs + row * input_stride, row, quantised);
    };
    share(rows, rows < 16 ? 1 : (int)threads, quantise);
    const Product product{codes, scale, base, gain, bias, groups, outputs, &quantised, out, out_stride};
    const int64_t blocks = (outputs + LANES - 1) / LANES;
    const int64_t tall = quantised.tall, areas_down = (rows + tall - 1) / tall;
    const int64_t pieces = std::max<int64_t>(1, 6 * threads / areas_down);
    const int64_t wide = std::max<int64_t>(4, (blocks / pieces + 3) / 4 * 4);
    const int64_t areas_across = (blocks + wide - 1) / wide;
    share(areas_down * areas_across, (int)threads, [&](int64_t at) {
        const int64_t down = at / areas_across, across = at % areas_across;
        area(product, (int)bits, down * tall, std::min(rows, (down + 1) * tall), across * wide,
             std::min(blocks, (across + 1) * wide));
    });
}

// out [count, 32 · groups] = the weight's rows of these numbers. Answers 0, or 1 where one is not a row's.
int64_t triptych_rows(const int64_t* numbers, int64_t count, const uint8_t* codes, const uint16_t* scale,
                      const uint16_t* base, float gain, int64_t bits, int64_t groups, int64_t rows, float* out,
                      int64_t threads) {
    for (int64_t at = 0; at < count; at++)
        if (numbers[at] < 0 || numbers[at] >= rows) return 1;
    share(count, count < 16 ? 1 : (int)threads, [&](int64_t at) {
        const int64_t block = numbers[at] / LANES, lane = numbers[at] % LANES;
        for (int64_t group = 0; group < groups; group++) {
            const int64_t place = block * groups + group;
            const uint8_t* from = codes + place * bits * 64 + lane * 4;
            float* into = out + (at * groups + group) * GROUP;
            const float factor = _cvtsh_ss(scale[place * LANES + lane]) * gain;
            const float added = base ? _cvtsh_ss(base[place * LANES + lane]) * gain : 0.0f;
            for (int column = 0; column < GROUP; column++) {
                const int within = bits == 4 ? column % (GROUP / 2) : column;
                const int stored = from[within / 4 * 64 + within % 4];
                const int code = bits == 8 ? stored - 128 : (column < GROUP / 2 ? stored & 15 : stored >> 4) - 8;
                into[column] = factor * (float)code + added;
            }
        }
    });
    return 0;
}

}  // extern "C"
