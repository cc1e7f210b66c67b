// Dropout by counter on CUDA: one Philox counter makes the mask of four elements, a thread moves 16 bytes at a time.
#include "dropout.h"

#include <algorithm>

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cuda/launch.cuh"

namespace randlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 132 * 32;

template <class T>
__global__ void __launch_bounds__(kThreads)
    dropout_kernel(T* __restrict__ out, const T* __restrict__ x, const int64_t* __restrict__ seed, uint32_t threshold,
                   acc_t<T> keep_scale, int64_t elements, bool vector) {
  constexpr int N = kVec<T> < 4 ? 4 : kVec<T>;  // whole counters
  const uint64_t key = uint64_t(*seed);  // read on the device: no synchronisation, and a graph replays with new seeds
  const DropoutMask mask{threshold, uint32_t(key), uint32_t(key >> 32)};
  const int64_t step = int64_t(gridDim.x) * kThreads * N;
  for (int64_t e = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N; e < elements; e += step) {
    acc_t<T> value[N];
    load_pack(value, x + e, elements - e, vector);
#pragma unroll
    for (int q = 0; q < N / 4; ++q) {
      const Philox4 w = mask.words(uint64_t(e) / 4 + q);
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) value[4 * q + lane] *= w.v[lane] < threshold ? acc_t<T>(0) : keep_scale;
    }
    store_pack(out + e, value, elements - e, vector);
  }
}

template <class T>
void drop(const at::Tensor& out, const at::Tensor& x, const at::Tensor& seed, double p) {
  constexpr int N = kVec<T> < 4 ? 4 : kVec<T>;
  const int64_t blocks = std::min(kMaxBlocks, divide_up(x.numel(), int64_t(kThreads) * N));
  const bool vector = can_pack<T, N>(x.const_data_ptr(), {}) && can_pack<T, N>(out.const_data_ptr(), {});
  launch(dropout_kernel<T>, {blocks}, kThreads, out.mutable_data_ptr<T>(), x.const_data_ptr<T>(),
         seed.const_data_ptr<int64_t>(), dropout_threshold(p), acc_t<T>(1 / (1 - p)), x.numel(), vector);
}

at::Tensor dropout(const at::Tensor& x, const at::Tensor& seed, double p) {
  check_dropout(x, seed, p);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor from = x.contiguous(), out = at::empty_like(from);
  if (out.numel() == 0) return out;
  with_float_type(x.scalar_type(), [&](auto type) {
    drop<decltype(type)>(out, from, seed, p);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, CUDA, m) { m.impl("dropout", &dropout); }

}  // namespace randlora::cuda
