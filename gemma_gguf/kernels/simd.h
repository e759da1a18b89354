// The SIMD vocabulary of the kernels: f32 (LANES floats), i32 (LANES 32-bit integers), mask (LANES truth values).
//
// Consumed by files that are compiled once per instruction set (GEMMA_ISA = avx2 or avx512). Lane l of every value
// belongs to block l: no operation here mixes lanes except the ones that say so. Each is the exact IEEE operation on
// each lane (add, sub, mul, div, sqrt are correctly rounded in hardware), so a lane computes what scalar code computes.
// Reach through `.v` for an intrinsic that has no name here.
#pragma once

#include <immintrin.h>

#include <cfloat>
#include <cstdint>
#include <cstring>

#ifndef GEMMA_ISA
#error "compile with -DGEMMA_ISA=avx2 or -DGEMMA_ISA=avx512"
#endif

#define GEMMA_INLINE static inline __attribute__((always_inline))

namespace gemma::GEMMA_ISA {

#if defined(__AVX512F__)

constexpr int LANES = 16;
constexpr unsigned ALL_LANES = 0xffff;
struct f32 { __m512 v; };
struct i32 { __m512i v; };
struct mask { __mmask16 v; };

GEMMA_INLINE f32 splat(float a) { return {_mm512_set1_ps(a)}; }
GEMMA_INLINE i32 splat(int32_t a) { return {_mm512_set1_epi32(a)}; }
GEMMA_INLINE f32 load(const float * p) { return {_mm512_loadu_ps(p)}; }
GEMMA_INLINE i32 load(const int32_t * p) { return {_mm512_loadu_si512(p)}; }
GEMMA_INLINE void store(float * p, f32 a) { _mm512_storeu_ps(p, a.v); }
GEMMA_INLINE void store(int32_t * p, i32 a) { _mm512_storeu_si512(p, a.v); }

GEMMA_INLINE f32 operator+(f32 a, f32 b) { return {_mm512_add_ps(a.v, b.v)}; }
GEMMA_INLINE f32 operator-(f32 a, f32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
GEMMA_INLINE f32 operator*(f32 a, f32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
GEMMA_INLINE f32 operator/(f32 a, f32 b) { return {_mm512_div_ps(a.v, b.v)}; }
GEMMA_INLINE f32 square_root(f32 a) { return {_mm512_sqrt_ps(a.v)}; }
GEMMA_INLINE f32 absolute(f32 a) { return {_mm512_abs_ps(a.v)}; }
// minimum(a, b) is `a < b ? a : b` and maximum(a, b) is `a > b ? a : b`: b when either is NaN or both are zero.
GEMMA_INLINE f32 minimum(f32 a, f32 b) { return {_mm512_min_ps(a.v, b.v)}; }
GEMMA_INLINE f32 maximum(f32 a, f32 b) { return {_mm512_max_ps(a.v, b.v)}; }

GEMMA_INLINE i32 operator+(i32 a, i32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
GEMMA_INLINE i32 operator-(i32 a, i32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
GEMMA_INLINE i32 operator*(i32 a, i32 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
GEMMA_INLINE i32 operator&(i32 a, i32 b) { return {_mm512_and_si512(a.v, b.v)}; }
GEMMA_INLINE i32 operator|(i32 a, i32 b) { return {_mm512_or_si512(a.v, b.v)}; }
GEMMA_INLINE i32 operator^(i32 a, i32 b) { return {_mm512_xor_si512(a.v, b.v)}; }
GEMMA_INLINE i32 minimum(i32 a, i32 b) { return {_mm512_min_epi32(a.v, b.v)}; }
GEMMA_INLINE i32 maximum(i32 a, i32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int N> GEMMA_INLINE i32 shift_left(i32 a) { return {_mm512_slli_epi32(a.v, N)}; }
template <int N> GEMMA_INLINE i32 shift_right(i32 a) { return {_mm512_srli_epi32(a.v, N)}; }  // logical

GEMMA_INLINE i32 bits_of(f32 a) { return {_mm512_castps_si512(a.v)}; }
GEMMA_INLINE f32 float_from_bits(i32 a) { return {_mm512_castsi512_ps(a.v)}; }
GEMMA_INLINE f32 to_float(i32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
GEMMA_INLINE i32 truncate(f32 a) { return {_mm512_cvttps_epi32(a.v)}; }  // as C's (int): INT32_MIN out of range

// Comparisons with NaN are false, as in C; `!(a < b)` is true for NaN: use not_less.
GEMMA_INLINE mask operator<(f32 a, f32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
GEMMA_INLINE mask operator<=(f32 a, f32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
GEMMA_INLINE mask operator>(f32 a, f32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
GEMMA_INLINE mask operator>=(f32 a, f32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
GEMMA_INLINE mask operator==(f32 a, f32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
GEMMA_INLINE mask operator!=(f32 a, f32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ)}; }
GEMMA_INLINE mask not_less(f32 a, f32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ)}; }
GEMMA_INLINE mask operator==(i32 a, i32 b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
GEMMA_INLINE mask operator>(i32 a, i32 b) { return {_mm512_cmpgt_epi32_mask(a.v, b.v)}; }

GEMMA_INLINE mask operator&(mask a, mask b) { return {static_cast<__mmask16>(a.v & b.v)}; }
GEMMA_INLINE mask operator|(mask a, mask b) { return {static_cast<__mmask16>(a.v | b.v)}; }
GEMMA_INLINE mask operator~(mask a) { return {static_cast<__mmask16>(~a.v)}; }
GEMMA_INLINE unsigned lanes_of(mask a) { return a.v; }  // bit l is lane l
// t where m, else f.
GEMMA_INLINE f32 select(mask m, f32 t, f32 f) { return {_mm512_mask_blend_ps(m.v, f.v, t.v)}; }
GEMMA_INLINE i32 select(mask m, i32 t, i32 f) { return {_mm512_mask_blend_epi32(m.v, f.v, t.v)}; }

#elif defined(__AVX2__)

constexpr int LANES = 8;
constexpr unsigned ALL_LANES = 0xff;
struct f32 { __m256 v; };
struct i32 { __m256i v; };
struct mask { __m256 v; };  // all bits of a lane set, or none

GEMMA_INLINE f32 splat(float a) { return {_mm256_set1_ps(a)}; }
GEMMA_INLINE i32 splat(int32_t a) { return {_mm256_set1_epi32(a)}; }
GEMMA_INLINE f32 load(const float * p) { return {_mm256_loadu_ps(p)}; }
GEMMA_INLINE i32 load(const int32_t * p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))}; }
GEMMA_INLINE void store(float * p, f32 a) { _mm256_storeu_ps(p, a.v); }
GEMMA_INLINE void store(int32_t * p, i32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), a.v); }

GEMMA_INLINE f32 operator+(f32 a, f32 b) { return {_mm256_add_ps(a.v, b.v)}; }
GEMMA_INLINE f32 operator-(f32 a, f32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
GEMMA_INLINE f32 operator*(f32 a, f32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
GEMMA_INLINE f32 operator/(f32 a, f32 b) { return {_mm256_div_ps(a.v, b.v)}; }
GEMMA_INLINE f32 square_root(f32 a) { return {_mm256_sqrt_ps(a.v)}; }
GEMMA_INLINE f32 absolute(f32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
GEMMA_INLINE f32 minimum(f32 a, f32 b) { return {_mm256_min_ps(a.v, b.v)}; }
GEMMA_INLINE f32 maximum(f32 a, f32 b) { return {_mm256_max_ps(a.v, b.v)}; }

GEMMA_INLINE i32 operator+(i32 a, i32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
GEMMA_INLINE i32 operator-(i32 a, i32 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
GEMMA_INLINE i32 operator*(i32 a, i32 b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
GEMMA_INLINE i32 operator&(i32 a, i32 b) { return {_mm256_and_si256(a.v, b.v)}; }
GEMMA_INLINE i32 operator|(i32 a, i32 b) { return {_mm256_or_si256(a.v, b.v)}; }
GEMMA_INLINE i32 operator^(i32 a, i32 b) { return {_mm256_xor_si256(a.v, b.v)}; }
GEMMA_INLINE i32 minimum(i32 a, i32 b) { return {_mm256_min_epi32(a.v, b.v)}; }
GEMMA_INLINE i32 maximum(i32 a, i32 b) { return {_mm256_max_epi32(a.v, b.v)}; }
template <int N> GEMMA_INLINE i32 shift_left(i32 a) { return {_mm256_slli_epi32(a.v, N)}; }
template <int N> GEMMA_INLINE i32 shift_right(i32 a) { return {_mm256_srli_epi32(a.v, N)}; }

GEMMA_INLINE i32 bits_of(f32 a) { return {_mm256_castps_si256(a.v)}; }
GEMMA_INLINE f32 float_from_bits(i32 a) { return {_mm256_castsi256_ps(a.v)}; }
GEMMA_INLINE f32 to_float(i32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
GEMMA_INLINE i32 truncate(f32 a) { return {_mm256_cvttps_epi32(a.v)}; }

GEMMA_INLINE mask operator<(f32 a, f32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
GEMMA_INLINE mask operator<=(f32 a, f32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
GEMMA_INLINE mask operator>(f32 a, f32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
GEMMA_INLINE mask operator>=(f32 a, f32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
GEMMA_INLINE mask operator==(f32 a, f32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
GEMMA_INLINE mask operator!=(f32 a, f32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ)}; }
GEMMA_INLINE mask not_less(f32 a, f32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ)}; }
GEMMA_INLINE mask operator==(i32 a, i32 b) { return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))}; }
GEMMA_INLINE mask operator>(i32 a, i32 b) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.v, b.v))}; }

GEMMA_INLINE mask operator&(mask a, mask b) { return {_mm256_and_ps(a.v, b.v)}; }
GEMMA_INLINE mask operator|(mask a, mask b) { return {_mm256_or_ps(a.v, b.v)}; }
GEMMA_INLINE mask operator~(mask a) {
    return {_mm256_xor_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))};
}
GEMMA_INLINE unsigned lanes_of(mask a) { return static_cast<unsigned>(_mm256_movemask_ps(a.v)); }
GEMMA_INLINE f32 select(mask m, f32 t, f32 f) { return {_mm256_blendv_ps(f.v, t.v, m.v)}; }
GEMMA_INLINE i32 select(mask m, i32 t, i32 f) {
    return {_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(f.v), _mm256_castsi256_ps(t.v), m.v))};
}

#else
#error "simd.h needs AVX2 or AVX-512"
#endif

GEMMA_INLINE bool any(mask m) { return lanes_of(m) != 0; }
GEMMA_INLINE bool all(mask m) { return lanes_of(m) == ALL_LANES; }
// Flips the sign bit, as C's unary minus does (0 - a would turn 0 into +0).
GEMMA_INLINE f32 operator-(f32 a) { return float_from_bits(bits_of(a) ^ splat(INT32_MIN)); }

// nearest_int of ggml-quants.c: adding 1.5 * 2^23 rounds half to even and leaves the integer in the low 23 bits. For
// |a| above 2^22 both give the same wrong number; that range is reachable, so the integer form must be kept.
constexpr float ROUNDING = 12582912.0f;
GEMMA_INLINE i32 nearest_int(f32 a) {
    return (bits_of(a + splat(ROUNDING)) & splat(0x007fffff)) - splat(0x00400000);
}
GEMMA_INLINE int nearest_int(float a) {
    const float moved = a + ROUNDING;
    int32_t bits;
    memcpy(&bits, &moved, sizeof bits);
    return (bits & 0x007fffff) - 0x00400000;
}

// GGML_FP32_TO_FP16 and back: round to nearest even.
GEMMA_INLINE uint16_t half_of(float a) { return _cvtss_sh(a, _MM_FROUND_TO_NEAREST_INT); }
GEMMA_INLINE float float_of(uint16_t half) { return _cvtsh_ss(half); }

template <class T> GEMMA_INLINE T min_of(T a, T b) { return b < a ? b : a; }
template <class T> GEMMA_INLINE T max_of(T a, T b) { return a < b ? b : a; }

// Mixes lanes: 8 floats from each of 8 places become 8 vectors of one float from each, `stride` floats apart.
GEMMA_INLINE void transpose_8x8(const float * const * rows, int at, float * out, int stride) {
    __m256 r[8], pair[8], quad[8];
    for (int k = 0; k < 8; k++) r[k] = _mm256_loadu_ps(rows[k] + at);
    for (int k = 0; k < 4; k++) {
        pair[2 * k] = _mm256_unpacklo_ps(r[2 * k], r[2 * k + 1]);
        pair[2 * k + 1] = _mm256_unpackhi_ps(r[2 * k], r[2 * k + 1]);
    }
    for (int k = 0; k < 2; k++) {
        quad[4 * k] = _mm256_shuffle_ps(pair[4 * k], pair[4 * k + 2], 0x44);
        quad[4 * k + 1] = _mm256_shuffle_ps(pair[4 * k], pair[4 * k + 2], 0xee);
        quad[4 * k + 2] = _mm256_shuffle_ps(pair[4 * k + 1], pair[4 * k + 3], 0x44);
        quad[4 * k + 3] = _mm256_shuffle_ps(pair[4 * k + 1], pair[4 * k + 3], 0xee);
    }
    for (int k = 0; k < 4; k++) {
        _mm256_storeu_ps(out + k * stride, _mm256_permute2f128_ps(quad[k], quad[k + 4], 0x20));
        _mm256_storeu_ps(out + (k + 4) * stride, _mm256_permute2f128_ps(quad[k], quad[k + 4], 0x31));
    }
}

// Blocks to lanes: out[i * LANES + l] = blocks[l][first + i] for i < n; n is a multiple of 8.
GEMMA_INLINE void to_lanes(const float * const * blocks, int first, int n, float * out) {
    for (int i = 0; i < n; i += 8)
        for (int l = 0; l < LANES; l += 8) transpose_8x8(blocks + l, first + i, out + i * LANES + l, LANES);
}

// LANES consecutive blocks of a matrix, block `first` on; lanes beyond the last block repeat it, and `count` says how
// many results are to be kept. `weights` may be nullptr.
struct BlockGroup {
    const float * x[LANES];
    const float * w[LANES];
    int count;

    BlockGroup(const float * matrix, const float * weights, int64_t first, int64_t n_blocks, int64_t per_row, int block) {
        count = static_cast<int>(min_of<int64_t>(LANES, n_blocks - first));
        for (int l = 0; l < LANES; l++) {
            const int64_t k = min_of<int64_t>(first + l, n_blocks - 1);
            x[l] = matrix + k * block;
            w[l] = weights ? weights + (k % per_row) * block : nullptr;
        }
    }
};

}  // namespace gemma::GEMMA_ISA
