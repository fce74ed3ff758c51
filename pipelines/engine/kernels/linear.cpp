// Products of inputs with quantised weights. Plain C functions on plain pointers: knows no torch and no model.
//
// A row's result has the same bits whatever rows are beside it and however many threads compute them (products.h).

#include "crew.h"
#include "products.h"

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
    quantised.resize(rows, groups, bits == 4 ? 8 : 128);
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
