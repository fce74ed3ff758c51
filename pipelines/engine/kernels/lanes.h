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
using Ints = __m512i;  // sixteen, or the 64 bytes of four columns of sixteen rows

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
inline void store_as_bytes(int8_t* at, Floats a) {
    _mm_storeu_si128((__m128i*)at, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a)));
}
inline float sum(Floats a) { return _mm512_reduce_add_ps(a); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a); }
inline Ints low_nibbles(Ints a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
inline Ints high_nibbles(Ints a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
inline Ints nibbles(Ints a, int32_t part) {  // the low ones of parts 0 … 3, the high ones of 4 … 7
    return _mm512_and_si512(_mm512_srl_epi16(a, _mm_cvtsi32_si128(part & 4)), _mm512_set1_epi8(15));
}

// Codes are unsigned, as vpdpbusd takes them; what that adds, the code of zero times the inputs, is taken off first.
template <int BITS>
inline Ints start(int32_t inputs) {
    return all(-(BITS == 4 ? 8 : 128) * inputs);
}
template <int BITS>
inline Ints prepared(Ints codes) {
    return codes;
}
template <int BITS>
inline Ints dot(Ints sums, Ints codes, int32_t four_inputs) {
    return _mm512_dpbusd_epi32(sums, codes, all(four_inputs));
}

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

constexpr int MOST_ROWS = 6, MOST_BLOCKS = 2;  // of 32 registers 24 are sums

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
inline void store_as_bytes(int8_t* at, Floats x) {
    const __m256i pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    const __m256i ordered = _mm256_permute4x64_epi64(pairs, 0xd8);
    _mm_storeu_si128((__m128i*)at,
                     _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
}
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
inline Ints low_nibbles(Ints x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Ints high_nibbles(Ints x) {
    return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)});
}
inline Ints nibbles(Ints x, int32_t part) {
    const __m128i by = _mm_cvtsi32_si128(part & 4);
    return low_nibbles({_mm256_srl_epi16(x.a, by), _mm256_srl_epi16(x.b, by)});
}

// Pairs of products are 16-bit sums that saturate: 2 · 15 · 127 does not, 2 · 255 · 127 would, so that 8-bit codes
// are made signed and their signs moved to the inputs: 2 · 128 · 127 does not either.
template <int BITS>
inline Ints start(int32_t inputs) {
    return all(BITS == 4 ? -8 * inputs : 0);
}
template <int BITS>
inline Ints prepared(Ints codes) {
    if (BITS == 4) return codes;
    const __m256i zero = _mm256_set1_epi8((char)0x80);
    return {_mm256_xor_si256(codes.a, zero), _mm256_xor_si256(codes.b, zero)};
}
template <int BITS>
inline __m256i dot_part(__m256i sums, __m256i codes, __m256i inputs) {
    const __m256i pairs = BITS == 4
                              ? _mm256_maddubs_epi16(codes, inputs)
                              : _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(inputs, codes));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
template <int BITS>
inline Ints dot(Ints sums, Ints codes, int32_t four_inputs) {
    const __m256i inputs = _mm256_set1_epi32(four_inputs);
    return {dot_part<BITS>(sums.a, codes.a, inputs), dot_part<BITS>(sums.b, codes.b, inputs)};
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

constexpr int MOST_ROWS = 3, MOST_BLOCKS = 1;  // a block is two of 16 registers

#endif

inline int32_t four(const int8_t* at) {
    int32_t found;
    std::memcpy(&found, at, 4);
    return found;
}

}  // namespace
