// Attention of ragged queries over paged keys and values, for CPUs; see native.py.
//
//   q, out      [T, N, H] f32, bf16 or f16        kv_lens [S], q_starts [S + 1], table [S, M] i32
//   k, v pages  [P, K, B, H], in one of the formats below       lse [T, N] f32
//   scales      [P, K, B] f32, or empty                 tree    [T, W] u32, or empty
//
// A sequence of one token ("decode") is cut into parts of kPart keys. A part has H in the lanes of
// the registers, and the parts are joined afterwards. More tokens of a sequence are cut into tiles
// of query rows (tokens times the N / K heads that share keys). A tile has rows in the lanes:
// scores lie as [keys, rows] and sums as [H, rows], so that no softmax goes across lanes.
//
// Blocks of keys begin at multiples of kKeys and parts at multiples of kPart. So the order of a
// row's sums depends on its own position alone, not on threads, tiles or other sequences.
#include <vector>

#include "../native/parallel.h"
#include "../native/simd.h"

#ifndef NAME
#error "compile with -DNAME=<symbol of the handler>"
#endif

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kKeys = 64;     // of a block
constexpr int64_t kMaxRows = 96;  // of a tile
constexpr int64_t kPart = 1024;   // keys of a part
constexpr float kLowest = -1e30f;

// ---------------------------------------------------------------- formats

// The 16 levels of int4 pages, by the code's bits; see base.int4_levels.
struct Levels {
  alignas(64) float of[16];
  Levels() {
    for (int bits = 0; bits < 16; ++bits) {
      const float u = (static_cast<float>(bits < 8 ? bits : bits - 16) + 0.5f) / 7.5f;
      of[bits] = u * (0.7f + 0.3f * u * u);
    }
  }
};
const Levels kLevels;

// Each loads numbers h .. h + 15 of a row of `dim`; `width` is the row's length in T.
struct F32Pages {
  using T = float;
  static int64_t width(int64_t dim) { return dim; }
  static Vec load16(const T* row, int64_t h, int64_t) { return load(row + h); }
};
struct Bf16Pages {
  using T = uint16_t;
  static int64_t width(int64_t dim) { return dim; }
  static Vec load16(const T* row, int64_t h, int64_t) { return from_bf16(row + h); }
};
struct F16Pages {
  using T = uint16_t;
  static int64_t width(int64_t dim) { return dim; }
  static Vec load16(const T* row, int64_t h, int64_t) { return from_f16(row + h); }
};
struct I8Pages {
  using T = int8_t;
  static int64_t width(int64_t dim) { return dim; }
  static Vec load16(const T* row, int64_t h, int64_t) { return from_i8(row + h); }
};
struct E4m3Pages {
  using T = uint8_t;
  static int64_t width(int64_t dim) { return dim; }
  static Vec load16(const T* row, int64_t h, int64_t) { return from_e4m3(row + h); }
};
struct I4Pages {  // byte i has number i in its low half and number i + H / 2 in its high half
  using T = uint8_t;
  static int64_t width(int64_t dim) { return dim / 2; }
  static Vec load16(const T* row, int64_t h, int64_t dim) {
    const bool is_high = h >= dim / 2;
    return from_table(row + (is_high ? h - dim / 2 : h), is_high, kLevels.of);
  }
};

// ---------------------------------------------------------------- a call

struct Call {
  int64_t num_tokens, num_heads, num_kv_heads, dim, page_size, num_pages, table_width, num_seqs;
  const void* q;
  ffi::DataType dtype;
  const void *k_pages, *v_pages;
  const float *k_scale, *v_scale;
  const int32_t* table;
  const uint32_t* tree;
  int64_t tree_words;
  void* out;
  float* lse;
  float sm_scale, soft_cap;
  int64_t window;
  std::vector<int64_t> lens, starts;  // kv_lens and q_starts, forced into their bounds

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t num_queries(int64_t seq) const { return starts[seq + 1] - starts[seq]; }

  // The row of key i in the pages, counted in rows of H numbers.
  int64_t key_row(int64_t seq, int64_t head, int64_t i) const {
    const int64_t page = std::clamp<int64_t>(table[seq * table_width + i / page_size], 0, num_pages - 1);
    return (page * num_kv_heads + head) * page_size + i % page_size;
  }
  Vec load_q(int64_t i) const {
    if (dtype == ffi::F32) return load(static_cast<const float*>(q) + i);
    const uint16_t* bits = static_cast<const uint16_t*>(q) + i;
    return dtype == ffi::BF16 ? from_bf16(bits) : from_f16(bits);
  }
  void store_out(int64_t i, Vec x) const {
    if (dtype == ffi::F32) return store(static_cast<float*>(out) + i, x);
    uint16_t* bits = static_cast<uint16_t*>(out) + i;
    if (dtype == ffi::BF16) to_bf16(bits, x);
    else to_f16(bits, x);
  }
  Vec cap(Vec scores) const {
    if (soft_cap <= 0) return scores;
    return tanh16(scores * set1(1.f / soft_cap)) * set1(soft_cap);
  }
};

float log_sum(float top, float total) { return total > 0 || total != total ? top + std::log(total) : -INFINITY; }

// ---------------------------------------------------------------- decode

struct Part {
  int64_t seq, head, begin, end;  // keys
  int64_t at;                     // of its results: for each query head H sums, the top and the total
};

// Keys of `part` for query heads first .. first + kGroup - 1, whose H are kVectors vectors.
template <typename P, int kVectors, int kGroup>
void attend_heads(const Call& c, const Part& part, int64_t first, float* results) {
  const auto* k_pages = static_cast<const typename P::T*>(c.k_pages);
  const auto* v_pages = static_cast<const typename P::T*>(c.v_pages);
  const int64_t dim = c.dim, width = P::width(dim), q_at = (c.starts[part.seq] * c.num_heads + first) * dim;
  Vec q[kGroup][kVectors], sums[kGroup][kVectors];
  float tops[kGroup], totals[kGroup];
  alignas(64) float scores[kGroup][kKeys];
  for (int g = 0; g < kGroup; ++g) {
    tops[g] = kLowest;
    totals[g] = 0.f;
    for (int v = 0; v < kVectors; ++v) {
      q[g][v] = c.load_q(q_at + g * dim + 16 * v) * set1(c.sm_scale);
      sums[g][v] = set1(0.f);
    }
  }
  for (int64_t block = part.begin; block < part.end; block = (block / kKeys + 1) * kKeys) {
    const int64_t count = std::min((block / kKeys + 1) * kKeys, part.end) - block;
    int64_t rows[kKeys];
    for (int64_t i = 0; i < count; ++i) rows[i] = c.key_row(part.seq, part.head, block + i);
    for (int64_t i = 0; i < count; ++i) {
      const auto* k = k_pages + rows[i] * width;
      Vec dots[kGroup];
      for (int g = 0; g < kGroup; ++g) dots[g] = set1(0.f);
      for (int v = 0; v < kVectors; ++v) {
        const Vec x = P::load16(k, 16 * v, dim);
        for (int g = 0; g < kGroup; ++g) dots[g] = fma(q[g][v], x, dots[g]);
      }
      const float scale = c.k_scale ? c.k_scale[rows[i]] : 1.f;
      for (int g = 0; g < kGroup; ++g) scores[g][i] = sum(dots[g]) * scale;
    }
    for (int g = 0; g < kGroup; ++g) {
      for (int64_t i = count; i < kKeys; ++i) scores[g][i] = -INFINITY;
      Vec top = set1(tops[g]);
      for (int64_t i = 0; i < kKeys; i += 16) {
        Vec s = load(scores[g] + i);
        if (c.soft_cap > 0) {
          store(scores[g] + i, c.cap(s));
          for (int64_t j = std::max(count, i); j < i + 16; ++j) scores[g][j] = -INFINITY;
          s = load(scores[g] + i);
        }
        top = max(s, top);
      }
      const float new_top = largest(top);
      Vec total = set1(0.f);
      for (int64_t i = 0; i < kKeys; i += 16) {
        const Vec p = exp_negative(load(scores[g] + i) - set1(new_top));
        total = total + p;
        store(scores[g] + i, p);
      }
      alignas(64) float alpha[16];
      store(alpha, exp_negative(set1(tops[g] - new_top)));
      tops[g] = new_top;
      totals[g] = totals[g] * alpha[0] + sum(total);
      for (int v = 0; v < kVectors; ++v) sums[g][v] = sums[g][v] * set1(alpha[0]);
    }
    for (int64_t i = 0; i < count; ++i) {
      const auto* row = v_pages + rows[i] * width;
      const float scale = c.v_scale ? c.v_scale[rows[i]] : 1.f;
      Vec weights[kGroup];
      for (int g = 0; g < kGroup; ++g) weights[g] = set1(scores[g][i] * scale);
      for (int v = 0; v < kVectors; ++v) {
        const Vec x = P::load16(row, 16 * v, dim);
        for (int g = 0; g < kGroup; ++g) sums[g][v] = fma(weights[g], x, sums[g][v]);
      }
    }
  }
  for (int g = 0; g < kGroup; ++g) {
    float* result = results + part.at + (first - part.head * c.group() + g) * (dim + 2);
    for (int v = 0; v < kVectors; ++v) store(result + 16 * v, sums[g][v]);
    result[dim] = tops[g];
    result[dim + 1] = totals[g];
  }
}

template <typename P, int kVectors>
void attend_part(const Call& c, const Part& part, float* results) {
  int64_t head = part.head * c.group();
  const int64_t end = head + c.group();
  for (; head + 4 <= end; head += 4) attend_heads<P, kVectors, 4>(c, part, head, results);
  switch (end - head) {
    case 3: return attend_heads<P, kVectors, 3>(c, part, head, results);
    case 2: return attend_heads<P, kVectors, 2>(c, part, head, results);
    case 1: return attend_heads<P, kVectors, 1>(c, part, head, results);
  }
}

// Joins the parts of one KV head of a sequence, in order, and writes out and lse.
void join_parts(const Call& c, const Part* parts, int64_t count, const float* results) {
  const int64_t dim = c.dim;
  for (int64_t g = 0; g < c.group(); ++g) {
    const int64_t head = c.starts[parts->seq] * c.num_heads + parts->head * c.group() + g;
    auto result = [&](int64_t part) { return results + parts[part].at + g * (dim + 2); };
    float top = kLowest, total = 0.f;
    for (int64_t i = 0; i < count; ++i) top = result(i)[dim] > top ? result(i)[dim] : top;
    std::vector<float> alphas(count);
    for (int64_t i = 0; i < count; ++i) {
      alphas[i] = count == 1 ? 1.f : std::exp(result(i)[dim] - top);
      total += alphas[i] * result(i)[dim + 1];
    }
    const Vec inverse = set1(total != 0.f ? 1.f / total : 0.f);
    for (int64_t h = 0; h < dim; h += 16) {
      Vec x = set1(0.f);
      for (int64_t i = 0; i < count; ++i) x = fma(load(result(i) + h), set1(alphas[i]), x);
      c.store_out(head * dim + h, x * inverse);
    }
    c.lse[head] = log_sum(top, total);
  }
}

// ---------------------------------------------------------------- tiles

struct Tile {
  int64_t seq, head, first, count;  // tokens first .. first + count - 1 of the sequence
};

// c[i, rows] (+)= sum over j of a[i * step_i + j * step_j] * b[j, rows], kWide vectors of rows.
template <int kWide>
void multiply(float* c, const float* a, int64_t step_i, int64_t step_j, const float* b, int64_t num_i,
              int64_t num_j, int64_t stride, bool is_added) {
  for (int64_t i = 0; i < num_i; i += 4) {
    Vec sums[4][kWide];
    for (int x = 0; x < 4; ++x)
      for (int v = 0; v < kWide; ++v) sums[x][v] = is_added ? load(c + (i + x) * stride + 16 * v) : set1(0.f);
    for (int64_t j = 0; j < num_j; ++j) {
      Vec row[kWide];
      for (int v = 0; v < kWide; ++v) row[v] = load(b + j * stride + 16 * v);
      for (int x = 0; x < 4; ++x) {
        const Vec factor = set1(a[(i + x) * step_i + j * step_j]);
        for (int v = 0; v < kWide; ++v) sums[x][v] = fma(factor, row[v], sums[x][v]);
      }
    }
    for (int x = 0; x < 4; ++x)
      for (int v = 0; v < kWide; ++v) store(c + (i + x) * stride + 16 * v, sums[x][v]);
  }
}

void multiply_rows(float* c, const float* a, int64_t step_i, int64_t step_j, const float* b, int64_t num_i,
                   int64_t num_j, int64_t stride, bool is_added) {
#if defined(__AVX512F__)
  constexpr int kWide = 3;
#else
  constexpr int kWide = 1;
#endif
  int64_t r = 0;
  for (; r + 16 * kWide <= stride; r += 16 * kWide)
    multiply<kWide>(c + r, a, step_i, step_j, b + r, num_i, num_j, stride, is_added);
  for (; r < stride; r += 16) multiply<1>(c + r, a, step_i, step_j, b + r, num_i, num_j, stride, is_added);
}

// The rows of a tile: which keys each one sees, and its softmax so far.
struct Rows {
  int64_t count, stride;  // in vectors
  int64_t tree_start;     // first key that the tree's bits are about; the number of keys without one
  float low[kMaxRows], high[kMaxRows];  // keys i with low < i <= high, before the tree
  const uint32_t* bits[kMaxRows];       // of the tree
  Vec tops[kMaxRows / 16], totals[kMaxRows / 16];
};

// One block of the softmax of rows r .. r + 15: their scores [keys, rows] become weights. Returns
// the factors of what was summed before.
Vec soften(const Call& c, Rows& rows, int64_t r, float* scores, int64_t block, int64_t count,
           const float* k_scale, const float* v_scale, bool is_masked) {
  const int64_t stride = rows.stride;
  const Vec old = rows.tops[r / 16], low = load(rows.low + r), high = load(rows.high + r);
  Vec top = old, total = set1(0.f);
  for (int64_t i = 0; i < count; ++i) {
    Vec s = c.cap(load(scores + i * stride) * set1(c.sm_scale * (k_scale ? k_scale[i] : 1.f)));
    const int64_t key = block + i, bit = key - rows.tree_start;
    if (bit >= 0) {
      alignas(64) float kept[16];
      for (int64_t x = 0; x < 16; ++x) {
        const uint32_t* words = rows.bits[r + x];
        kept[x] = words && words[bit / 32] >> bit % 32 & 1 ? 1.f : 0.f;
      }
      s = keep_between(s, set1(0.f) - load(kept), -0.5f, set1(0.f));
    } else if (is_masked) {
      s = keep_between(s, low, static_cast<float>(key), high);
    }
    store(scores + i * stride, s);
    top = max(s, top);
  }
  for (int64_t i = 0; i < count; ++i) {
    const Vec p = exp_negative(load(scores + i * stride) - top);
    total = total + p;
    store(scores + i * stride, v_scale ? p * set1(v_scale[i]) : p);
  }
  const Vec alpha = exp_negative(old - top);
  rows.tops[r / 16] = top;
  rows.totals[r / 16] = fma(rows.totals[r / 16], alpha, total);
  return alpha;
}

Rows make_rows(const Call& c, const Tile& tile) {
  Rows rows;
  rows.count = tile.count * c.group();
  rows.stride = (rows.count + 15) / 16 * 16;
  const int64_t num_queries = c.num_queries(tile.seq), start = c.lens[tile.seq] - num_queries;
  const bool has_tree = c.tree && num_queries > 1;
  rows.tree_start = has_tree ? start : INT64_MAX / 2;
  for (int64_t r = 0; r < rows.stride; ++r) {
    rows.bits[r] = nullptr;
    rows.low[r] = rows.high[r] = -1.f;
    if (r >= rows.count) continue;
    const int64_t token = tile.first + r / c.group();
    int64_t position = start + token;
    if (has_tree) {  // a node's depth is the number of its ancestors
      rows.bits[r] = c.tree + (c.starts[tile.seq] + token) * c.tree_words;
      position = start - 1;
      for (int64_t bit = 0; bit < num_queries; ++bit) position += rows.bits[r][bit / 32] >> bit % 32 & 1;
    }
    rows.high[r] = static_cast<float>(position);
    if (c.window) rows.low[r] = static_cast<float>(position - c.window);
  }
  for (int64_t r = 0; r < rows.stride; r += 16) {
    rows.tops[r / 16] = set1(kLowest);
    rows.totals[r / 16] = set1(0.f);
  }
  return rows;
}

template <typename P>
void attend_tile(const Call& c, const Tile& tile) {
  const auto* k_pages = static_cast<const typename P::T*>(c.k_pages);
  const auto* v_pages = static_cast<const typename P::T*>(c.v_pages);
  const int64_t dim = c.dim, width = P::width(dim), group = c.group();
  Rows rows = make_rows(c, tile);
  const int64_t stride = rows.stride;
  auto q_row = [&](int64_t r) {
    const int64_t token = c.starts[tile.seq] + tile.first + r / group;
    return (token * c.num_heads + tile.head * group + r % group) * dim;
  };
  float* scores = scratch<float, 0>(kKeys * stride);
  float* sums = scratch<float, 1>(dim * stride);
  float* keys = scratch<float, 2>(2 * kKeys * dim);
  float* values = keys + kKeys * dim;
  float* q = scratch<float, 3>(dim * stride);  // [H, rows]
  std::fill(sums, sums + dim * stride, 0.f);
  for (int64_t r = 0; r < stride; r += 16)
    for (int64_t h = 0; h < dim; h += 16) {
      alignas(64) float t[16][16];
      for (int64_t x = 0; x < 16; ++x) store(t[x], r + x < rows.count ? c.load_q(q_row(r + x) + h) : set1(0.f));
      transpose(t[0], 16, q + h * stride + r, stride);
    }
  // What the tile's tokens see, from the first to the last.
  const int64_t len = c.lens[tile.seq], base = len - c.num_queries(tile.seq) + tile.first;
  const bool has_tree = rows.tree_start < len;
  const int64_t end = has_tree ? len : std::min(len, base + tile.count);
  const int64_t seen = c.window ? std::max<int64_t>(0, (has_tree ? rows.tree_start : base) - c.window + 1) : 0;
  float k_scale[kKeys], v_scale[kKeys];
  for (int64_t block = seen / kKeys * kKeys; block < end; block += kKeys) {
    const int64_t count = std::min(kKeys, end - block), padded = (count + 3) / 4 * 4;
    for (int64_t i = 0; i < padded; ++i) {
      if (i >= count) {
        std::fill(keys + i * dim, keys + (i + 1) * dim, 0.f);
        continue;
      }
      const int64_t row = c.key_row(tile.seq, tile.head, block + i);
      if (c.k_scale) k_scale[i] = c.k_scale[row], v_scale[i] = c.v_scale[row];
      for (int64_t h = 0; h < dim; h += 16) {
        store(keys + i * dim + h, P::load16(k_pages + row * width, h, dim));
        store(values + i * dim + h, P::load16(v_pages + row * width, h, dim));
      }
    }
    multiply_rows(scores, keys, dim, 1, q, padded, dim, stride, false);
    const bool is_masked = c.window || block + count > base + 1;
    for (int64_t r = 0; r < stride; r += 16) {
      const Vec alpha = soften(c, rows, r, scores + r, block, count, c.k_scale ? k_scale : nullptr,
                               c.v_scale ? v_scale : nullptr, is_masked);
      if (sum(alpha) != 16.f)
        for (int64_t h = 0; h < dim; ++h) store(sums + h * stride + r, load(sums + h * stride + r) * alpha);
    }
    multiply_rows(sums, values, 1, dim, scores, dim, count, stride, true);
  }
  for (int64_t r = 0; r < stride; r += 16) {
    alignas(64) float tops[16], totals[16], inverse[16], t[16][16];
    store(tops, rows.tops[r / 16]);
    store(totals, rows.totals[r / 16]);
    for (int64_t x = 0; x < 16; ++x) inverse[x] = totals[x] != 0.f ? 1.f / totals[x] : 0.f;
    const int64_t live = std::min<int64_t>(16, rows.count - r);
    for (int64_t h = 0; h < dim; h += 16) {
      transpose(sums + h * stride + r, stride, t[0], 16);
      for (int64_t x = 0; x < live; ++x) c.store_out(q_row(r + x) + h, load(t[x]) * set1(inverse[x]));
    }
    for (int64_t x = 0; x < live; ++x) c.lse[q_row(r + x) / dim] = log_sum(tops[x], totals[x]);
  }
}

// ---------------------------------------------------------------- all of it

template <typename P>
void attend_parts(ffi::ThreadPool& pool, const Call& c, const std::vector<Part>& parts,
                  const std::vector<int64_t>& firsts) {
  const int64_t size = static_cast<int64_t>(parts.size());
  // The caller's own memory: its other users are done, and helpers only write to it.
  float* results = scratch<float, 4>(size * c.group() * (c.dim + 2));
  int64_t num_keys = 0;
  for (const Part& part : parts) num_keys += part.end - part.begin;
  parallel_for(pool, size, 2 * num_keys * c.group() * c.dim, [&](int64_t i) {
    switch (c.dim) {
      case 64: return attend_part<P, 4>(c, parts[i], results);
      case 96: return attend_part<P, 6>(c, parts[i], results);
      case 128: return attend_part<P, 8>(c, parts[i], results);
    }
  });
  for (size_t i = 0; i + 1 < firsts.size(); ++i)
    join_parts(c, parts.data() + firsts[i], firsts[i + 1] - firsts[i], results);
}

template <typename P>
void attend(ffi::ThreadPool& pool, const Call& c) {
  const bool has_parts = c.dim == 64 || c.dim == 96 || c.dim == 128;
  std::vector<Part> parts;
  std::vector<int64_t> firsts;  // first part of each (sequence, head), and the number of parts
  std::vector<Tile> tiles;
  const int64_t tokens = std::max<int64_t>(1, kMaxRows / c.group());
  for (int64_t s = 0; s < c.num_seqs; ++s) {
    const int64_t count = c.num_queries(s), len = c.lens[s];
    if (count == 1 && has_parts && len > 0) {
      const int64_t begin = c.window ? std::max<int64_t>(0, len - c.window) : 0;
      for (int64_t h = 0; h < c.num_kv_heads; ++h) {
        firsts.push_back(static_cast<int64_t>(parts.size()));
        for (int64_t at = begin; at < len; at = (at / kPart + 1) * kPart) {
          const int64_t result = static_cast<int64_t>(parts.size()) * c.group() * (c.dim + 2);
          parts.push_back({s, h, at, std::min(len, (at / kPart + 1) * kPart), result});
        }
      }
      continue;
    }
    // The last tiles see most keys: they come first, so that no thread is left with one.
    for (int64_t first = (count - 1) / tokens * tokens; count > 0 && first >= 0; first -= tokens)
      for (int64_t h = 0; h < c.num_kv_heads; ++h)
        tiles.push_back({s, h, first, std::min(tokens, count - first)});
  }
  firsts.push_back(static_cast<int64_t>(parts.size()));
  if (!parts.empty()) attend_parts<P>(pool, c, parts, firsts);
  int64_t work = 0;
  for (const Tile& tile : tiles) work += 2 * tile.count * c.group() * c.dim * c.lens[tile.seq];
  parallel_for(pool, static_cast<int64_t>(tiles.size()), work, [&](int64_t i) { attend_tile<P>(c, tiles[i]); });
}

using I32 = ffi::Buffer<ffi::S32>;
using F32 = ffi::Buffer<ffi::F32>;

ffi::Error check(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k_pages, bool is_packed) {
  const auto q_shape = q.dimensions(), shape = k_pages.dimensions();
  if (q_shape.size() != 3 || shape.size() != 4) return ffi::Error::InvalidArgument("q [T, N, H], pages [P, K, B, H]");
  const int64_t dim = shape[3] * (is_packed ? 2 : 1);
  if (q_shape[2] != dim || dim % (is_packed ? 32 : 16) || q_shape[1] % shape[1] || q_shape[1] / shape[1] > kMaxRows)
    return ffi::Error::InvalidArgument("paged_attention: heads that this kernel does not read");
  return ffi::Error::Success();
}

ffi::Error Run(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k_pages, ffi::AnyBuffer v_pages, F32 k_scale,
               F32 v_scale, I32 kv_lens, I32 table, I32 q_starts, ffi::Buffer<ffi::U32> tree,
               ffi::Result<ffi::AnyBuffer> out, ffi::Result<F32> lse, float sm_scale, float soft_cap, int64_t window,
               int32_t format) {
  if (ffi::Error error = check(q, k_pages, format == 5); error.failure()) return error;
  const auto q_shape = q.dimensions(), shape = k_pages.dimensions();
  const bool has_scale = k_scale.element_count() > 0, has_tree = tree.element_count() > 0;
  Call c;
  c.num_tokens = q_shape[0], c.num_heads = q_shape[1], c.dim = q_shape[2];
  c.num_pages = shape[0], c.num_kv_heads = shape[1], c.page_size = shape[2];
  c.num_seqs = table.dimensions()[0], c.table_width = table.dimensions()[1];
  c.q = q.untyped_data(), c.dtype = q.element_type();
  c.k_pages = k_pages.untyped_data(), c.v_pages = v_pages.untyped_data();
  c.k_scale = has_scale ? k_scale.typed_data() : nullptr;
  c.v_scale = has_scale ? v_scale.typed_data() : nullptr;
  c.table = table.typed_data();
  c.tree = has_tree ? tree.typed_data() : nullptr;
  c.tree_words = has_tree ? tree.dimensions()[1] : 0;
  c.out = out->untyped_data(), c.lse = lse->typed_data();
  c.sm_scale = sm_scale, c.soft_cap = soft_cap, c.window = window;
  c.starts.push_back(0);
  for (int64_t s = 0; s < c.num_seqs; ++s) {
    const int64_t first = c.starts.back();
    const int64_t end = std::clamp<int64_t>(q_starts.typed_data()[s + 1], first, c.num_tokens);
    c.starts.push_back(end);
    c.lens.push_back(std::clamp<int64_t>(kv_lens.typed_data()[s], 0, c.table_width * c.page_size));
  }
  const Vec zero = set1(0.f);
  for (int64_t i = c.starts.back() * c.num_heads * c.dim; i < c.num_tokens * c.num_heads * c.dim; i += 16)
    c.store_out(i, zero);
  std::fill(c.lse + c.starts.back() * c.num_heads, c.lse + c.num_tokens * c.num_heads, -INFINITY);
  switch (format) {
    case 0: attend<F32Pages>(pool, c); break;
    case 1: attend<Bf16Pages>(pool, c); break;
    case 2: attend<F16Pages>(pool, c); break;
    case 3: attend<I8Pages>(pool, c); break;
    case 4: attend<E4m3Pages>(pool, c); break;
    case 5: attend<I4Pages>(pool, c); break;
    default: return ffi::Error::InvalidArgument("paged_attention: unknown format of pages");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()          // q
                                  .Arg<ffi::AnyBuffer>()          // k_pages
                                  .Arg<ffi::AnyBuffer>()          // v_pages
                                  .Arg<F32>()                     // k_scale
                                  .Arg<F32>()                     // v_scale
                                  .Arg<I32>()                     // kv_lens
                                  .Arg<I32>()                     // page_table
                                  .Arg<I32>()                     // q_starts
                                  .Arg<ffi::Buffer<ffi::U32>>()   // tree_mask
                                  .Ret<ffi::AnyBuffer>()          // out
                                  .Ret<F32>()                     // lse
                                  .Attr<float>("sm_scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<int64_t>("window")
                                  .Attr<int32_t>("format"));
