// y[M, O] = x[M, I] @ w for weights of 4 or 8 bits on CPUs; see native.py for the layout of w.
//
//   w[i, o] = scale[i / group, o] * code[i, o] + low[i / group, o]      code in 0 .. 2^bits - 1
//
// Rows of x are rounded to int8, 32 inputs with one scale, so that products are sums of integers:
//
//   y[o] = sum over groups, and over their 32s, of  scale * xs * (codes . xcodes) + low * xsum
//
// A row's sums have one order, whatever the number of rows and threads.
#include "../native/parallel.h"
#include "../native/simd.h"

#ifndef NAME
#error "compile with -DNAME=<symbol of the handler>"
#endif

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kIn = 32;    // inputs that share a scale of x
constexpr int64_t kOuts = 16;  // outputs of a strip of w: the lanes of a register
constexpr int kQuads = 8;      // 4 inputs each, of the 32

struct Weight {
  const uint8_t* data;  // [strips, groups] blocks: codes by 32 inputs, then 16 scales, 16 lows
  int64_t num_strips, num_groups, subs;  // `subs`: 32s of a group
  int bits;
  bool is_wide;  // scales and lows are f32, else f16

  int64_t code_bytes() const { return 64 * bits; }
  int64_t scale_bytes() const { return is_wide ? 64 : 32; }
  int64_t block_bytes() const { return subs * code_bytes() + 2 * scale_bytes(); }
  const uint8_t* block(int64_t strip, int64_t group) const {
    return data + (strip * num_groups + group) * block_bytes();
  }
  Vec number(const uint8_t* block, int which) const {
    const uint8_t* p = block + subs * code_bytes() + which * scale_bytes();
    return is_wide ? load(reinterpret_cast<const float*>(p)) : from_f16(reinterpret_cast<const uint16_t*>(p));
  }
};

// x in int8 with a scale for 32 inputs; `sums` are scale * (sum of codes), which `low` multiplies.
struct Rounded {
  int8_t* codes;
  float *scales, *sums;
};

inline void store_codes(int8_t* p, Vec a) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
#else
  const __m256i v = _mm256_cvtps_epi32(a.v), w = _mm256_cvtps_epi32(a.w);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v, w), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#endif
}

template <typename Load>
void round_row(Load load16, int64_t num_blocks, int64_t row, Rounded& out) {
  for (int64_t g = 0; g < num_blocks; ++g) {
    Vec a = load16(g * kIn), b = load16(g * kIn + 16);
    const float top = largest(max(abs(a), abs(b)));
    const float poison = sum((a + b) * set1(0.f));  // NaN where a number is not finite, else 0
    const float scale = top / 127.f, inverse = top > 1e-30f ? 127.f / top : 0.f;
    const int64_t at = row * num_blocks + g;
    a = round_even(a * set1(inverse));
    b = round_even(b * set1(inverse));
    store_codes(out.codes + at * kIn, a);
    store_codes(out.codes + at * kIn + 16, b);
    out.scales[at] = scale + poison;
    out.sums[at] = sum(a + b) * scale + poison;
  }
}

// ---------------------------------------------------------------- products of 32 inputs

#if defined(__AVX512VNNI__)
struct Codes {
  __m512i v[kQuads];
};
template <int kBits>
Codes unpack(const uint8_t* p) {
  Codes c;
  const __m512i mask = _mm512_set1_epi8(15);
  for (int j = 0; j < kQuads; ++j) {
    if (kBits == 8) {
      c.v[j] = _mm512_loadu_si512(p + 64 * j);
    } else if (j < 4) {
      const __m512i both = _mm512_loadu_si512(p + 64 * j);
      c.v[j] = _mm512_and_si512(both, mask);
      c.v[j + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    }
  }
  return c;
}
template <int kBits>
inline Vec dot(const Codes& c, const int8_t* x) {
  int32_t quads[kQuads];
  std::memcpy(quads, x, kIn);
  __m512i even = _mm512_setzero_si512(), odd = even;
  for (int j = 0; j < kQuads; j += 2) {
    even = _mm512_dpbusd_epi32(even, c.v[j], _mm512_set1_epi32(quads[j]));
    odd = _mm512_dpbusd_epi32(odd, c.v[j + 1], _mm512_set1_epi32(quads[j + 1]));
  }
  return {_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd))};
}
constexpr float kShift8 = 0.f;
#else
// 8-bit codes are made signed here, 128 less: `low` is raised by as many scales.
struct Codes {
  __m256i v[kQuads], w[kQuads];
};
template <int kBits>
Codes unpack(const uint8_t* p) {
  Codes c;
  const __m256i mask = _mm256_set1_epi8(15), sign = _mm256_set1_epi8(-128);
  auto split = [&](int j, const uint8_t* q, __m256i* to) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    if (kBits == 8) {
      to[j] = _mm256_xor_si256(both, sign);
    } else {
      to[j] = _mm256_and_si256(both, mask);
      to[j + 4] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
    }
  };
  for (int j = 0; j < kBits; ++j) {
    split(j, p + 64 * j, c.v);
    split(j, p + 64 * j + 32, c.w);
  }
  return c;
}
template <int kBits>
inline __m256 half_dot(const __m256i* c, const int32_t* quads) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i total = _mm256_setzero_si256();
  for (int j = 0; j < kQuads; ++j) {
    const __m256i x = _mm256_set1_epi32(quads[j]);
    if (kBits == 4) {  // 8 sums of 2 * 15 * 127 fit 16 bits
      total = _mm256_add_epi16(total, _mm256_maddubs_epi16(c[j], x));
    } else {  // |code| times x with the code's sign: products of codes above 127 would saturate
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(c[j]), _mm256_sign_epi8(x, c[j]));
      total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, ones));
    }
  }
  return _mm256_cvtepi32_ps(kBits == 4 ? _mm256_madd_epi16(total, ones) : total);
}
template <int kBits>
inline Vec dot(const Codes& c, const int8_t* x) {
  int32_t quads[kQuads];
  std::memcpy(quads, x, kIn);
  return {half_dot<kBits>(c.v, quads), half_dot<kBits>(c.w, quads)};
}
constexpr float kShift8 = 128.f;
#endif

// ---------------------------------------------------------------- strips

// Rows row .. row + kRows - 1 of one strip.
template <int kRows, int kBits>
void multiply_rows(const Weight& w, int64_t strip, const Rounded& x, int64_t row, Vec* total) {
  const int64_t num_blocks = w.num_groups * w.subs;
  for (int r = 0; r < kRows; ++r) total[r] = set1(0.f);
  for (int64_t g = 0; g < w.num_groups; ++g) {
    const uint8_t* block = w.block(strip, g);
    const Vec scale = w.number(block, 0);
    Vec low = w.number(block, 1);
    if (kBits == 8 && kShift8 != 0.f) low = fma(scale, set1(kShift8), low);
    for (int64_t s = 0; s < w.subs; ++s) {
      const uint8_t* codes_at = block + s * w.code_bytes();
      if (kRows == 1)  // the hardware's prefetchers stop at the ends of 4 KiB pages
        for (int64_t i = 0; i < 64 * kBits; i += 64)
          _mm_prefetch(reinterpret_cast<const char*>(codes_at) + 4096 + i, _MM_HINT_T0);
      const Codes codes = unpack<kBits>(codes_at);
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = (row + r) * num_blocks + g * w.subs + s;
        const Vec product = dot<kBits>(codes, x.codes + at * kIn);
        total[r] = fma(scale * set1(x.scales[at]), product, total[r]);
        total[r] = fma(low, set1(x.sums[at]), total[r]);
      }
    }
  }
}

template <int kRows, int kBits>
void write_rows(const Weight& w, int64_t strip, const Rounded& x, int64_t row, float* y, int64_t width) {
  Vec total[kRows];
  multiply_rows<kRows, kBits>(w, strip, x, row, total);
  const int64_t count = std::min(kOuts, width - strip * kOuts);
  for (int r = 0; r < kRows; ++r) {
    float* to = y + (row + r) * width + strip * kOuts;
    if (count == kOuts) {
      store(to, total[r]);
    } else {  // the last strip is padded
      alignas(64) float t[kOuts];
      store(t, total[r]);
      std::copy(t, t + count, to);
    }
  }
}

template <int kBits>
void multiply_strip(const Weight& w, int64_t strip, const Rounded& x, int64_t num_rows, float* y, int64_t width) {
  int64_t row = 0;
  for (; row + 8 <= num_rows; row += 8) write_rows<8, kBits>(w, strip, x, row, y, width);
  for (; row + 4 <= num_rows; row += 4) write_rows<4, kBits>(w, strip, x, row, y, width);
  for (; row < num_rows; ++row) write_rows<1, kBits>(w, strip, x, row, y, width);
}

Vec load_any(const void* x, ffi::DataType dtype, int64_t i) {
  if (dtype == ffi::F32) return load(static_cast<const float*>(x) + i);
  const uint16_t* bits = static_cast<const uint16_t*>(x) + i;
  return dtype == ffi::BF16 ? from_bf16(bits) : from_f16(bits);
}

void multiply(ffi::ThreadPool& pool, const Weight& w, ffi::AnyBuffer x, float* y, int64_t width) {
  const int64_t num_rows = x.dimensions()[0], num_inputs = x.dimensions()[1], num_blocks = num_inputs / kIn;
  // The caller's own memory, which helpers read.
  Rounded rounded{scratch<int8_t, 0>(num_rows * num_inputs), scratch<float, 0>(num_rows * num_blocks),
                  scratch<float, 1>(num_rows * num_blocks)};
  auto round_rows = [&](int64_t first, int64_t end) {
    for (int64_t r = first; r < end; ++r) {
      auto load16 = [&](int64_t i) { return load_any(x.untyped_data(), x.element_type(), r * num_inputs + i); };
      round_row(load16, num_blocks, r, rounded);
    }
  };
  const int64_t rows_step = std::max<int64_t>(1, num_rows / 16);
  parallel_for(pool, (num_rows + rows_step - 1) / rows_step, 8 * num_rows * num_inputs,
               [&](int64_t i) { round_rows(i * rows_step, std::min(num_rows, (i + 1) * rows_step)); });
  // Pieces that are few and large enough: a thread takes microseconds to begin one.
  const int64_t cost = num_inputs * kOuts * (num_rows < 4 ? 1 : num_rows / 2);
  const int64_t most = std::max<int64_t>(1, w.num_strips / pool.num_threads());
  const int64_t step = std::min(std::max<int64_t>(1, 131072 / cost), most);
  // Integers: 64 products an instruction, four times as many as floats.
  const int64_t work = num_rows * num_inputs * w.num_strips * kOuts / 4 + num_inputs * w.num_strips * kOuts;
  parallel_for(pool, (w.num_strips + step - 1) / step, work, [&](int64_t i) {
    for (int64_t strip = i * step; strip < std::min(w.num_strips, (i + 1) * step); ++strip) {
      if (w.bits == 4) multiply_strip<4>(w, strip, rounded, num_rows, y, width);
      else multiply_strip<8>(w, strip, rounded, num_rows, y, width);
    }
  });
}

ffi::Error Run(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U8> w, ffi::Result<ffi::Buffer<ffi::F32>> y,
               int32_t bits, int64_t group, bool is_wide) {
  const auto x_shape = x.dimensions(), w_shape = w.dimensions(), y_shape = y->dimensions();
  const bool is_formed = x_shape.size() == 2 && w_shape.size() == 3 && y_shape.size() == 2 &&
                         (bits == 4 || bits == 8) && group > 0 && group % kIn == 0;
  if (!is_formed) return ffi::Error::InvalidArgument("packed_matmul: x [M, I], w [strips, groups, bytes]");
  Weight weight{w.typed_data(), w_shape[0], w_shape[1], group / kIn, bits, is_wide};
  const bool fits = x_shape[1] == w_shape[1] * group && w_shape[2] == weight.block_bytes() &&
                    y_shape[0] == x_shape[0] && w_shape[0] == (y_shape[1] + kOuts - 1) / kOuts;
  if (!fits) return ffi::Error::InvalidArgument("packed_matmul: the shapes of x, w and y disagree");
  const auto dtype = x.element_type();
  if (dtype != ffi::F32 && dtype != ffi::BF16 && dtype != ffi::F16)
    return ffi::Error::InvalidArgument("packed_matmul: x must be f32, bf16 or f16");
  multiply(pool, weight, x, y->typed_data(), y_shape[1]);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()             // x
                                  .Arg<ffi::Buffer<ffi::U8>>()       // w
                                  .Ret<ffi::Buffer<ffi::F32>>()      // y
                                  .Attr<int32_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("is_wide"));
