// Updates of very sparse bases on CUDA. Warps walk the index lists of B; sums have one order, so results repeat.
//
// Forward: a block holds 16 rows j x a tile of o of the update in shared memory. A warp owns a row: its lanes look up
//   where 32 lists meet the tile, then the warp adds list after list. Written as rows, or, where rows j are columns of
//   the weight, 16 j at a time for every o.
// Backward: a block walks 8 columns; a warp owns every 8th base i, so that its gradients are added to by one thread.
#include "packed_update.h"
#include "sparse_update.h"

#include <algorithm>
#include <tuple>

#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cuda/launch.cuh"

namespace randlora::cuda {
namespace {

constexpr int kRows = 16, kWarps = 8;
constexpr int kColumnsPerBlock = 8;  // of the backward
constexpr unsigned kAll = 0xffffffffu;

template <class Acc>
constexpr int kTile = 2048 / int(sizeof(Acc));  // 32 KB of shared memory

// First position in [begin, end) whose index is at least `value`.
template <class Index>
__device__ int lower_bound(const Index* indices, int begin, int end, int64_t value) {
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (int64_t(indices[middle]) < value)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// out: [rows, M] with the strides given, or compact [count, M]; weight: the same shape and strides of its own, or null.
template <class T, class Index>
__global__ void __launch_bounds__(32 * kWarps)
    build(T* out, int64_t out_row, int64_t out_column, const T* weight, int64_t weight_row, int64_t weight_column,
          SparsePattern s, int64_t rows, const acc_t<T>* lambda, const acc_t<T>* gamma, acc_t<T> scale) {
  using Acc = acc_t<T>;
  __shared__ Acc sums[kRows][kTile<Acc> + 1];
  const Index* const indices = static_cast<const Index*>(s.b_indices);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_row = int64_t(blockIdx.x) * kRows, first = int64_t(blockIdx.y) * kTile<Acc>;
  const int64_t last = min(s.M, first + kTile<Acc>);
  for (int e = threadIdx.x; e < kRows * (kTile<Acc> + 1); e += 32 * kWarps) (&sums[0][0])[e] = Acc(0);
  __syncthreads();

  for (int row = warp; row < kRows && first_row + row < rows; row += kWarps) {
    int c = int(first_row + row);
    if (weight != nullptr) {
      c = lower_bound(s.columns, 0, int(s.count), first_row + row);
      if (c == s.count || s.columns[c] != first_row + row) continue;
    }
    const int64_t j = s.columns[c];
    for (int e = s.a_starts[c]; e < s.a_starts[c + 1]; ++e) {
      const int64_t k = s.a_entries[e] >> 1;
      const Acc a = s.a_entries[e] & 1 ? -scale : scale;
      for (int64_t i0 = 0; i0 < s.n; i0 += 32) {
        int plus = 0, plus_end = 0, minus = 0, minus_end = 0;
        Acc value = Acc(0);
        if (i0 + lane < s.n) {
          const int64_t p = k * s.n + i0 + lane;
          value = a * lambda[p] * gamma[(i0 + lane) * s.m + j];
          const int b0 = s.b_starts[2 * p], b1 = s.b_starts[2 * p + 1], b2 = s.b_starts[2 * p + 2];
          plus = lower_bound(indices, b0, b1, first);
          plus_end = lower_bound(indices, plus, b1, last);
          minus = lower_bound(indices, b1, b2, first);
          minus_end = lower_bound(indices, minus, b2, last);
        }
        for (int l = 0; l < 32 && i0 + l < s.n; ++l) {
          const Acc v = __shfl_sync(kAll, value, l);
          const int begin = __shfl_sync(kAll, plus, l), end = __shfl_sync(kAll, plus_end, l);
          const int begin2 = __shfl_sync(kAll, minus, l), end2 = __shfl_sync(kAll, minus_end, l);
          // Within a column of B no row occurs twice; the next column waits.
          for (int t = begin + lane; t < end; t += 32) sums[row][int64_t(indices[t]) - first] += v;
          for (int t = begin2 + lane; t < end2; t += 32) sums[row][int64_t(indices[t]) - first] -= v;
          __syncwarp();
        }
      }
    }
  }
  __syncthreads();

  const int width = int(last - first), valid = int(min(int64_t(kRows), rows - first_row));
  const bool by_rows = out_column == 1;
  for (int e = threadIdx.x; e < kRows * width; e += 32 * kWarps) {
    const int row = by_rows ? e / width : e % kRows, o = by_rows ? e % width : e / kRows;
    if (row >= valid) continue;
    Acc value = sums[row][o];
    if (weight != nullptr)
      value += static_cast<Acc>(weight[(first_row + row) * weight_row + (first + o) * weight_column]);
    out[(first_row + row) * out_row + (first + o) * out_column] = static_cast<T>(value);
  }
}

// partial: [blocks, r, n], zeros; dgamma: [n, m], zeros.
template <class Acc, class Index>
__global__ void __launch_bounds__(32 * kWarps) gather(const Acc* grad, SparsePattern s, const Acc* lambda,
                                                      const Acc* gamma, Acc scale, Acc* partial, Acc* dgamma) {
  const Index* const indices = static_cast<const Index*>(s.b_indices);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Acc* const dlambda = partial + int64_t(blockIdx.x) * s.r * s.n;
  const int64_t end_column = min(s.count, int64_t(blockIdx.x + 1) * kColumnsPerBlock);
  for (int64_t c = int64_t(blockIdx.x) * kColumnsPerBlock; c < end_column; ++c) {
    const Acc* const row = grad + c * s.M;
    const int64_t j = s.columns[c];
    for (int e = s.a_starts[c]; e < s.a_starts[c + 1]; ++e) {
      const int64_t k = s.a_entries[e] >> 1;
      const Acc a = s.a_entries[e] & 1 ? -scale : scale;
      for (int64_t i = warp; i < s.n; i += kWarps) {
        const int64_t p = k * s.n + i;
        const int b0 = s.b_starts[2 * p], b1 = s.b_starts[2 * p + 1], b2 = s.b_starts[2 * p + 2];
        Acc sum = Acc(0);
        for (int t = b0 + lane; t < b2; t += 32) {
          const int64_t o = indices[t];
          if (o < s.M) sum += t < b1 ? row[o] : -row[o];
        }
        for (int width = 16; width > 0; width /= 2) sum += __shfl_down_sync(kAll, sum, width);
        if (lane == 0) {
          dgamma[i * s.m + j] += a * sum * lambda[p];
          dlambda[p] += a * sum * gamma[i * s.m + j];
        }
      }
    }
  }
}

template <class Function>
void with_index(const SparsePattern& s, const Function& function) {
  if (s.short_indices)
    function(uint16_t{});
  else
    function(int32_t{});
}

template <class Function>
void with_type(at::ScalarType type, const Function& function) {
  switch (type) {
    case at::kDouble: return function(double{});
    case at::kFloat: return function(float{});
    case at::kBFloat16: return function(c10::BFloat16{});
    default: return function(c10::Half{});
  }
}

at::Tensor sparse_update(at::TensorList pattern, const at::Tensor& lambda, const at::Tensor& gamma, int64_t M,
                         double scale, const std::optional<at::Tensor>& weight, at::ScalarType dtype) {
  if (is_packed(pattern)) return unpacked_update(pattern, lambda, gamma, M, scale, weight, dtype);
  const SparsePattern s = check_pattern(pattern, lambda, gamma, M);
  const at::Tensor out = make_sparse_result(s, weight, gamma, dtype);
  if (out.numel() == 0) return out;
  const c10::cuda::CUDAGuard guard(gamma.device());
  const at::ScalarType acc = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor l = lambda.to(acc).contiguous(), g = gamma.to(acc).contiguous();
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    using Acc = acc_t<T>;
    with_index(s, [&](auto index) {
      const Grid grid{divide_up(out.size(0), kRows), divide_up(s.M, kTile<Acc>)};
      launch(build<T, decltype(index)>, grid, 32 * kWarps, out.mutable_data_ptr<T>(), out.stride(0), out.stride(1),
             weight.has_value() ? weight->const_data_ptr<T>() : nullptr, weight.has_value() ? weight->stride(0) : 0,
             weight.has_value() ? weight->stride(1) : 0, s, out.size(0), l.const_data_ptr<Acc>(),
             g.const_data_ptr<Acc>(), Acc(scale));
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> sparse_update_backward(const at::Tensor& grad, at::TensorList pattern,
                                                          const at::Tensor& lambda, const at::Tensor& gamma,
                                                          double scale, bool need_lambda, bool need_gamma) {
  if (is_packed(pattern)) return unpacked_update_backward(grad, pattern, lambda, gamma, scale, need_lambda, need_gamma);
  TORCH_CHECK_VALUE(grad.dim() == 2, "grad must have shape [columns, M], got ", grad.sizes());
  const SparsePattern s = check_pattern(pattern, lambda, gamma, grad.size(1));
  check_sparse_grad(s, grad, gamma);
  const c10::cuda::CUDAGuard guard(gamma.device());
  const at::ScalarType acc = grad.scalar_type();
  const at::Tensor rows = grad.contiguous(), l = lambda.to(acc).contiguous(), g = gamma.to(acc).contiguous();
  const int64_t blocks = divide_up(s.count, kColumnsPerBlock);
  const at::Tensor partial = at::zeros({blocks, s.r, s.n}, rows.options());
  const at::Tensor dgamma = at::zeros({s.n, s.m}, rows.options());
  const auto run = [&](auto t) {
    using Acc = decltype(t);
    with_index(s, [&](auto index) {
      launch(gather<Acc, decltype(index)>, {blocks}, 32 * kWarps, rows.const_data_ptr<Acc>(), s,
             l.const_data_ptr<Acc>(), g.const_data_ptr<Acc>(), Acc(scale), partial.mutable_data_ptr<Acc>(),
             dgamma.mutable_data_ptr<Acc>());
    });
  };
  if (blocks > 0) {
    if (acc == at::kDouble)
      run(double{});
    else
      run(float{});
  }
  const auto none = [](const at::Tensor& like) {
    return at::empty({0}, like.options());
  };
  return {need_lambda ? partial.sum(0).to(lambda.scalar_type()) : none(lambda),
          need_gamma ? dgamma.to(gamma.scalar_type()) : none(gamma)};
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, CUDA, m) {
  m.impl("sparse_update", &sparse_update);
  m.impl("sparse_update_backward", &sparse_update_backward);
}

}  // namespace randlora::cuda
