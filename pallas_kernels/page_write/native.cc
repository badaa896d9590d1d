// Writes rows of tokens into their places of a paged pool, in the pool's own memory; see native.py.
//
//   pool [P, K, B, ...]    rows [T, K, ...] of the same dtype    pages, offsets [T] i32
//
// Tokens whose page is not in 0 .. P - 1 are dropped.
#include "../native/parallel.h"

#ifndef NAME
#error "compile with -DNAME=<symbol of the handler>"
#endif

#include <cstring>

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kTokens = 64;  // of a piece of work

using I32 = ffi::Buffer<ffi::S32>;

ffi::Error Run(ffi::ThreadPool threads, ffi::AnyBuffer pool, ffi::AnyBuffer rows, I32 pages, I32 offsets,
               ffi::Result<ffi::AnyBuffer> out) {
  const auto shape = pool.dimensions(), row_shape = rows.dimensions();
  const bool fits = shape.size() >= 3 && row_shape.size() == shape.size() - 1 && row_shape[1] == shape[1] &&
                    std::equal(row_shape.begin() + 2, row_shape.end(), shape.begin() + 3) &&
                    pages.element_count() == static_cast<size_t>(row_shape[0]) &&
                    offsets.element_count() == pages.element_count() && rows.element_type() == pool.element_type();
  if (!fits) return ffi::Error::InvalidArgument("page_write: rows [T, K, ...] do not fit pool [P, K, B, ...]");
  const int64_t num_pages = shape[0], num_heads = shape[1], page_size = shape[2], num_tokens = row_shape[0];
  if (out->untyped_data() != pool.untyped_data()) std::memcpy(out->untyped_data(), pool.untyped_data(), pool.size_bytes());
  if (num_tokens == 0 || num_pages == 0) return ffi::Error::Success();
  const int64_t size = static_cast<int64_t>(rows.size_bytes()) / (num_tokens * num_heads);
  const auto* from = static_cast<const char*>(rows.untyped_data());
  auto* to = static_cast<char*>(out->untyped_data());
  const int32_t *page = pages.typed_data(), *offset = offsets.typed_data();
  // A number that is copied takes about as long as one multiplication.
  const int64_t work = static_cast<int64_t>(rows.element_count());
  parallel_for(threads, (num_tokens + kTokens - 1) / kTokens, work, [&](int64_t piece) {
    for (int64_t t = piece * kTokens; t < std::min(num_tokens, (piece + 1) * kTokens); ++t) {
      if (page[t] < 0 || page[t] >= num_pages || offset[t] < 0 || offset[t] >= page_size) continue;
      for (int64_t h = 0; h < num_heads; ++h) {
        const int64_t place = (page[t] * num_heads + h) * page_size + offset[t];
        std::memcpy(to + place * size, from + (t * num_heads + h) * size, size);
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()   // pool
                                  .Arg<ffi::AnyBuffer>()   // rows
                                  .Arg<I32>()              // pages
                                  .Arg<I32>()              // offsets
                                  .Ret<ffi::AnyBuffer>());  // pool, aliased
