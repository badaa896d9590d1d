// Sixteen floats in the registers of AVX-512 or AVX2, and what the kernels compute with them.
//
// A file that includes this one is compiled once for each instruction set. NaN passes through all
// functions here unless a comment says otherwise.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)

struct Vec {
  __m512 v;
};
inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// Of a NaN and a number it returns b.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec copy_sign(Vec a, Vec sign) {
  const __m512i bit = _mm512_set1_epi32(INT32_MIN);
  return {_mm512_castsi512_ps(
      _mm512_or_si512(_mm512_castps_si512(abs(a).v),
                      _mm512_and_si512(_mm512_castps_si512(sign.v), bit)))};
}
inline Vec round_even(Vec a) { return {_mm512_roundscale_ps(a.v, 8)}; }
inline Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// y where x >= bound or x is NaN, else 0.
inline Vec zero_below(Vec x, float bound, Vec y) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(bound), _CMP_NLT_UQ), y.v)};
}
// x where low < key <= high, else -infinity.
inline Vec keep_between(Vec x, Vec low, float key, Vec high) {
  const __m512 k = _mm512_set1_ps(key);
  const __mmask16 kept = _mm512_cmp_ps_mask(low.v, k, _CMP_LT_OQ) &
                         _mm512_cmp_ps_mask(k, high.v, _CMP_LE_OQ);
  return {_mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), kept, x.v)};
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

inline Vec from_bf16(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec from_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec from_i8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
inline Vec from_e4m3(const uint8_t* p) {
  // The bits of e4m3 are those of a float16 that is 256 times smaller; 0x7f stands for NaN.
  const __m256i wide =
      _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i size = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
  const __m256i is_nan = _mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
  __m256i half = _mm256_or_si256(sign, _mm256_slli_epi16(size, 7));
  half = _mm256_or_si256(half, _mm256_and_si256(is_nan, _mm256_set1_epi16(0x7e00)));
  return {_mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.f))};
}
// Entries of a table of 16 floats; the indices are the low or the high halves of 16 bytes.
inline Vec from_table(const uint8_t* p, bool is_high, const float* table) {
  __m512i codes =
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  if (is_high) codes = _mm512_srli_epi32(codes, 4);
  return {_mm512_permutexvar_ps(codes, _mm512_loadu_ps(table))};  // it reads 4 bits of an index
}
inline void to_f16(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, 0));
}
inline void to_bf16(uint16_t* p, Vec a) {  // to the nearest, ties to even
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}

// Transposes 16 x 16 floats: row i of `to` is column i of `from`.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  }
  // r[4 i + j] has column 4 q + j of rows 4 i .. 4 i + 3 in its quarter q.
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, b, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(c, d, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, t[i]);
}

#else  // AVX2, FMA and F16C

struct Vec {
  __m256 v, w;
};
inline Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec x) {
  _mm256_storeu_ps(p, x.v);
  _mm256_storeu_ps(p + 8, x.w);
}
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v), _mm256_mul_ps(a.w, b.w)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v), _mm256_div_ps(a.w, b.w)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v), _mm256_add_ps(a.w, b.w)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v), _mm256_sub_ps(a.w, b.w)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v), _mm256_fmadd_ps(a.w, b.w, c.w)};
}
// Of a NaN and a number it returns b.
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v), _mm256_max_ps(a.w, b.w)}; }
inline Vec abs(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_andnot_ps(sign, a.v), _mm256_andnot_ps(sign, a.w)};
}
inline Vec copy_sign(Vec a, Vec from) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_or_ps(_mm256_andnot_ps(sign, a.v), _mm256_and_ps(sign, from.v)),
          _mm256_or_ps(_mm256_andnot_ps(sign, a.w), _mm256_and_ps(sign, from.w))};
}
inline Vec round_even(Vec a) { return {_mm256_round_ps(a.v, 8), _mm256_round_ps(a.w, 8)}; }
inline __m256 power(__m256 n) {  // 2^n for n in -126 .. 127
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline Vec scale_by_power(Vec a, Vec n) {
  return {_mm256_mul_ps(a.v, power(n.v)), _mm256_mul_ps(a.w, power(n.w))};
}
// y where x >= bound or x is NaN, else 0.
inline Vec zero_below(Vec x, float bound, Vec y) {
  const __m256 b = _mm256_set1_ps(bound);
  return {_mm256_and_ps(_mm256_cmp_ps(x.v, b, _CMP_NLT_UQ), y.v),
          _mm256_and_ps(_mm256_cmp_ps(x.w, b, _CMP_NLT_UQ), y.w)};
}
inline __m256 keep_half(__m256 x, __m256 low, __m256 key, __m256 high) {
  const __m256 kept = _mm256_and_ps(_mm256_cmp_ps(low, key, _CMP_LT_OQ),
                                    _mm256_cmp_ps(key, high, _CMP_LE_OQ));
  return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), x, kept);
}
// x where low < key <= high, else -infinity.
inline Vec keep_between(Vec x, Vec low, float key, Vec high) {
  const __m256 k = _mm256_set1_ps(key);
  return {keep_half(x.v, low.v, k, high.v), keep_half(x.w, low.w, k, high.w)};
}
inline float sum(Vec a) {
  const __m256 s = _mm256_add_ps(a.v, a.w);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
inline float largest(Vec a) {
  float t[16];
  store(t, a);
  float top = t[0];
  for (float x : t) top = x > top ? x : top;
  return top;
}

inline __m256 half_from_bf16(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Vec from_bf16(const uint16_t* p) { return {half_from_bf16(p), half_from_bf16(p + 8)}; }
inline Vec from_f16(const uint16_t* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline Vec from_i8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline Vec from_e4m3(const uint8_t* p) {
  // The bits of e4m3 are those of a float16 that is 256 times smaller; 0x7f stands for NaN.
  const __m256i wide =
      _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i size = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
  const __m256i is_nan = _mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
  __m256i half = _mm256_or_si256(sign, _mm256_slli_epi16(size, 7));
  half = _mm256_or_si256(half, _mm256_and_si256(is_nan, _mm256_set1_epi16(0x7e00)));
  const __m256 factor = _mm256_set1_ps(256.f);
  return {_mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), factor),
          _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), factor)};
}
inline __m256 half_from_table(__m256i codes, const float* table) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), codes);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), codes);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}
// Entries of a table of 16 floats; the indices are the low or the high halves of 16 bytes.
inline Vec from_table(const uint8_t* p, bool is_high, const float* table) {
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if (is_high) bytes = _mm_srli_epi16(bytes, 4);
  bytes = _mm_and_si128(bytes, _mm_set1_epi8(15));
  return {half_from_table(_mm256_cvtepu8_epi32(bytes), table),
          half_from_table(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)), table)};
}
inline void to_f16(uint16_t* p, Vec a) {
  auto* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(a.v, 0));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(a.w, 0));
}
inline void to_bf16(uint16_t* p, Vec a) {  // to the nearest, ties to even
  float t[16];
  store(t, a);
  for (int i = 0; i < 16; ++i) {
    uint32_t bits;
    std::memcpy(&bits, t + i, 4);
    p[i] = t[i] != t[i] ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
}

// Transposes 16 x 16 floats: row i of `to` is column i of `from`.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[i * to_stride + j] = from[j * from_stride + i];
}

#endif

// e^x for x <= 0, to 2 units in the last place; 0 below -87.
inline Vec exp_negative(Vec given) {
  const Vec x = max(set1(-87.f), given);
  const Vec n = round_even(x * set1(1.44269504f));
  Vec r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = fma(r, set1(1.f / 720), set1(1.f / 120));
  for (float c : {1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) p = fma(p, r, set1(c));
  return zero_below(given, -87.f, scale_by_power(p, n));
}

// tanh x, to 1e-7 in all.
inline Vec tanh16(Vec x) {
  const Vec e = exp_negative(abs(x) * set1(-2.f));
  return copy_sign((set1(1.f) - e) / (set1(1.f) + e), x);
}

}  // namespace
