// Sixteen numbers side by side: what the kernels are written in.
//
// Chosen when it is compiled, for the very machine (pipelines/engine/native.py): AVX-512 with VNNI, else AVX2.

#pragma once

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "this processor has no AVX2 with FMA and F16C"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)
#define WIDE 1
#else
#define WIDE 0
#endif

namespace {

constexpr int GROUP = 32;  // columns that share a scale
constexpr int LANES = 16;  // weight rows computed side by side: a block

#if WIDE

using Floats = __m512;
using Ints = __m512i;  // sixteen, or 32 of 16 bits, or 64 bytes

inline Floats all(float value) { return _mm512_set1_ps(value); }
inline Ints all(int32_t value) { return _mm512_set1_epi32(value); }
inline Floats load(const float* at) { return _mm512_loadu_ps(at); }
inline void store(float* at, Floats value) { _mm512_storeu_ps(at, value); }
inline Ints load_bytes(const uint8_t* at) { return _mm512_loadu_si512(at); }
inline Floats half(const uint16_t* at) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at)); }
inline Floats brain(const uint16_t* at) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at)), 16));
}
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats magnitude(Floats a) { return _mm512_abs_ps(a); }
inline Floats largest_of_fours(Floats a) {  // in each of the four
    const Floats pairs = larger(a, _mm512_permute_ps(a, 0xb1));
    return larger(pairs, _mm512_permute_ps(pairs, 0x4e));
}
inline Floats nearest(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats power_of_two(Floats a, Floats whole) { return _mm512_scalef_ps(a, whole); }
inline Floats floats(Ints a) { return _mm512_cvtepi32_ps(a); }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a); }

// The sums of sixteen vectors.
inline Floats sums_of(const Floats* each) {
    Floats pairs[8], fours[4];
    for (int at = 0; at < 8; at++) {
        const Floats a = each[2 * at], b = each[2 * at + 1];
        pairs[at] = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int at = 0; at < 4; at++) {
        const __m512d a = _mm512_castps_pd(pairs[2 * at]), b = _mm512_castps_pd(pairs[2 * at + 1]);
        fours[at] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const auto across = [](Floats a, Floats b) {
        return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return across(across(fours[0], fours[1]), across(fours[2], fours[3]));
}
// `value` where `of` is above the limit or no number, else 0.
inline Floats where_above(Floats of, float limit, Floats value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(of, all(limit), _CMP_NLE_UQ), value);
}
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }

#else

struct Floats {
    __m256 a, b;
};
struct Ints {
    __m256i a, b;
};

inline Floats all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Ints all(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
inline Floats load(const float* at) { return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
inline void store(float* at, Floats value) {
    _mm256_storeu_ps(at, value.a);
    _mm256_storeu_ps(at + 8, value.b);
}
inline Ints load_bytes(const uint8_t* at) {
    return {_mm256_loadu_si256((const __m256i*)at), _mm256_loadu_si256((const __m256i*)(at + 32))};
}
inline Floats half(const uint16_t* at) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)at)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(at + 8)))};
}
inline __m256 brain_part(const uint16_t* at) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)at)), 16));
}
inline Floats brain(const uint16_t* at) { return {brain_part(at), brain_part(at + 8)}; }
inline Floats multiply(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats subtract(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats divide(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats larger(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats fused(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats magnitude(Floats x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline __m256 largest_of_fours(__m256 x) {
    const __m256 pairs = _mm256_max_ps(x, _mm256_permute_ps(x, 0xb1));
    return _mm256_max_ps(pairs, _mm256_permute_ps(pairs, 0x4e));
}
inline Floats largest_of_fours(Floats x) { return {largest_of_fours(x.a), largest_of_fours(x.b)}; }
constexpr int ROUND = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
inline Floats nearest(Floats x) { return {_mm256_round_ps(x.a, ROUND), _mm256_round_ps(x.b, ROUND)}; }
inline __m256 power_part(__m256 x, __m256 whole) {  // of a normal number and a result that is one
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23)));
}
inline Floats power_of_two(Floats x, Floats whole) {
    return {power_part(x.a, whole.a), power_part(x.b, whole.b)};
}
inline Floats floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline float sum(Floats x) {
    const __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest(Floats x) {
    const __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

inline __m256 sums_of_eight(const Floats* each) {
    __m256 pairs[4];
    for (int at = 0; at < 4; at++) {
        const Floats x = each[2 * at], y = each[2 * at + 1];
        pairs[at] = _mm256_hadd_ps(_mm256_add_ps(x.a, x.b), _mm256_add_ps(y.a, y.b));
    }
    const __m256 low = _mm256_hadd_ps(pairs[0], pairs[1]), high = _mm256_hadd_ps(pairs[2], pairs[3]);
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
inline Floats sums_of(const Floats* each) { return {sums_of_eight(each), sums_of_eight(each + 8)}; }
inline Floats where_above(Floats of, float limit, Floats value) {
    const __m256 than = _mm256_set1_ps(limit);
    return {_mm256_and_ps(_mm256_cmp_ps(of.a, than, _CMP_NLE_UQ), value.a),
            _mm256_and_ps(_mm256_cmp_ps(of.b, than, _CMP_NLE_UQ), value.b)};
}
inline Floats smaller(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }

#endif

}  // namespace
