// A loop over XLA's own threads, and scratch memory of a thread.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "xla/ffi/api/ffi.h"

namespace {

// Runs f(0) .. f(n - 1) on the caller and on threads of the pool; in any order, so f must not care.
//
// The caller works too, and in the end waits for items that another thread has begun, never for a
// thread to begin: it may itself be the only one of the pool that is free.
//
// `work_size` is about how many multiplications all items make: below kLeastWork the caller does them
// alone, since handing some over takes longer, above all on a machine with other users.
constexpr int64_t kLeastWork = 2'000'000;

template <typename F>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t n, int64_t work_size, F&& f) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  const int64_t helpers = work_size < kLeastWork ? 0 : std::min<int64_t>(pool.num_threads(), n) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  // A helper may begin when all is done and `f` is gone: only the state is its own.
  auto state = std::make_shared<State>();
  auto work = [state, n, body = &f] {
    for (int64_t i; (i = state->next.fetch_add(1, std::memory_order_relaxed)) < n;) {
      (*body)(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  while (state->done.load(std::memory_order_acquire) < n) _mm_pause();
}

// Memory of this thread for at least n values, aligned to cache lines; each Tag has its own.
template <typename T, int Tag>
T* scratch(int64_t n) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<T, Free> data;
  static thread_local int64_t size = 0;
  if (size < n) {
    data.reset(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 127) / 64 * 64)));
    size = n;
  }
  return data.get();
}

}  // namespace
