// Dropout by counter on the CPU.
#include "dropout.h"

#include <algorithm>

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cpu/large.h"
#include "cpu/vec.h"
#include "dtypes.h"
#include "sizes.h"

namespace randlora::cpu {
namespace {

constexpr int kQuads = 32;  // counters of a batch; more than 16, so that the compiler keeps the loop and vectorises it
constexpr int kBatch = 4 * kQuads;

template <class T>
struct DropElements {
  using Acc = acc_t<T>;
  // Elements [begin, end) of x; begin is a multiple of kBatch.
  static RANDLORA_INLINE void run(T* out, const T* x, const DropoutMask& mask, Acc keep_scale, int64_t begin,
                                  int64_t end) {
    for (int64_t e = begin; e < end; e += kBatch) {
      Acc factor[kBatch];
      for (int q = 0; q < kQuads; ++q) {
        const Philox4 w = mask.words(uint64_t(e) / 4 + uint64_t(q));
        factor[4 * q + 0] = w.v[0] < mask.threshold ? Acc(0) : keep_scale;
        factor[4 * q + 1] = w.v[1] < mask.threshold ? Acc(0) : keep_scale;
        factor[4 * q + 2] = w.v[2] < mask.threshold ? Acc(0) : keep_scale;
        factor[4 * q + 3] = w.v[3] < mask.threshold ? Acc(0) : keep_scale;
      }
      constexpr int L = kLanes<Acc>;
      const int64_t count = std::min<int64_t>(kBatch, end - e);
      int64_t i = 0;
      for (; i + L <= count; i += L) store(out + e + i, load(x + e + i) * load(factor + i));
      if (i < count) store_some(out + e + i, load_some(x + e + i, count - i) * load(factor + i), count - i);
    }
  }
};

template <class T>
void drop(const at::Tensor& out, const at::Tensor& x, const DropoutMask& mask, double p) {
  T* const to = advise_large(out).mutable_data_ptr<T>();
  const T* const from = x.const_data_ptr<T>();
  const int64_t elements = x.numel(), batches = divide_up(elements, kBatch);
  at::parallel_for(0, batches, 256, [&](int64_t begin, int64_t end) {
    run<DropElements<T>>(to, from, mask, acc_t<T>(1 / (1 - p)), begin * kBatch, std::min(elements, end * kBatch));
  });
}

at::Tensor dropout(const at::Tensor& x, const at::Tensor& seed, double p) {
  check_dropout(x, seed, p);
  const uint64_t key = uint64_t(*seed.const_data_ptr<int64_t>());
  const DropoutMask mask{dropout_threshold(p), uint32_t(key), uint32_t(key >> 32)};
  const at::Tensor from = x.contiguous(), out = at::empty_like(from);
  if (out.numel() == 0) return out;
  with_float_type(x.scalar_type(), [&](auto type) {
    drop<decltype(type)>(out, from, mask, p);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, CPU, m) { m.impl("dropout", &dropout); }

}  // namespace randlora::cpu
