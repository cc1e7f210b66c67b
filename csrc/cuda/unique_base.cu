// UniqueBaseGrad on CUDA, both directions bound by memory.
//
// Forward: a thread holds its columns of gamma[i] in registers and writes S for kRowsPerThread rows k.
// Backward: a warp owns one base i and one tile of columns, and walks over the rows k, kRowsAtOnce of which are under
// way from memory. Every gradient element is read once and goes into both results: dgamma in registers, and dlambda by
// reductions of as many rows at once, nine shuffles in place of forty. The warps of a block have neighbouring bases and
// the same tile, so that A comes from the L1 cache. Sums run in a fixed order and nothing is atomic, so results repeat
// bit for bit.
#include "unique_base.h"

#include <tuple>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cuda/launch.cuh"
#include "parameter_gradients.h"

namespace randlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerThread = 4;
constexpr int kWarps = 8;
constexpr int kRowsAtOnce = 8;
constexpr int kSumColumns = 32;

template <class Acc>
struct Factors {
  const Acc* lambda;  // [r, n]
  const Acc* gamma;   // [n, m]
  Acc scale;
  int64_t r, n, m;
};

template <class TA>
struct BaseA {
  const TA* data;  // [r, m], columns contiguous
  int64_t stride;
  bool vector;
};

template <class T, class TA>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(T* __restrict__ out /* [r, n, m] */, BaseA<TA> a, Factors<acc_t<T>> f, int64_t tiles,
                   bool out_vector, bool gamma_vector) {
  using Acc = acc_t<T>;
  constexpr int N = kVec<T>;
  const int64_t tile = blockIdx.x % tiles, i = blockIdx.x / tiles % f.n, k0 = blockIdx.x / tiles / f.n * kRowsPerThread;
  const int64_t j = (tile * kThreads + threadIdx.x) * N;
  if (j >= f.m) return;
  Acc gamma[N];
  load_pack(gamma, f.gamma + i * f.m + j, f.m - j, gamma_vector);
#pragma unroll
  for (int row = 0; row < kRowsPerThread; ++row) {
    const int64_t k = k0 + row;
    if (k >= f.r) return;
    const Acc c = f.lambda[k * f.n + i] * f.scale;
    Acc value[N];
    load_pack(value, a.data + k * a.stride + j, f.m - j, a.vector);
#pragma unroll
    for (int e = 0; e < N; ++e) value[e] = c * value[e] * gamma[e];
    store_pack(out + (k * f.n + i) * f.m + j, value, f.m - j, out_vector);
  }
}

template <class T>
struct Gradient {
  const T* data;  // [r, n, m], columns contiguous
  int64_t stride_k, stride_i;
  bool vector;
};

// p[0:N] as it lies in memory, 16 bytes or less at once; or, unless kWhole, as much as `valid` says and zeros.
template <bool kWhole, int N, class T>
__device__ __forceinline__ Pack<T, N> load_raw(const T* p, [[maybe_unused]] int64_t valid) {
  if constexpr (kWhole) {
    return *reinterpret_cast<const Pack<T, N>*>(p);
  } else {
    Pack<T, N> pack;
#pragma unroll
    for (int e = 0; e < N; ++e) pack.v[e] = e < valid ? p[e] : T(0);
    return pack;
  }
}

// Of kCount numbers of each lane their sums over all lanes, one of them to a lane: to the 32 / kCount lanes from lane
// 32 / kCount x on, number x. As many shuffles as kCount, and log2(32 / kCount) - 1.
template <int kCount, int kBit = 16, class Acc>
__device__ __forceinline__ Acc sum_over_lanes(const Acc (&v)[kCount], int lane) {
  if constexpr (kCount > 1) {
    const bool upper = (lane & kBit) != 0;
    Acc half[kCount / 2];
#pragma unroll
    for (int x = 0; x < kCount / 2; ++x) {
      const Acc kept = upper ? v[x + kCount / 2] : v[x], given = upper ? v[x] : v[x + kCount / 2];
      half[x] = kept + __shfl_xor_sync(0xFFFFFFFFu, given, kBit);
    }
    return sum_over_lanes<kCount / 2, kBit / 2>(half, lane);
  } else {
    Acc sum = v[0];
#pragma unroll
    for (int bit = kBit; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, bit);
    return sum;
  }
}

// Of one base i and columns j to j + N of each lane; sum += dgamma's. kWhole: all lanes have N columns, aligned.
template <bool kWhole, int N, class T, class TA>
__device__ __forceinline__ void backward_rows(const Gradient<T>& grad, const BaseA<TA>& a, const Factors<acc_t<T>>& f,
                                              acc_t<T>* partial /* [r] */, int64_t i, int64_t j,
                                              const acc_t<T> (&gamma)[N], acc_t<T> (&sum)[N]) {
  using Acc = acc_t<T>;
  constexpr int kLanes = 32 / kRowsAtOnce;  // that end up with the same row
  const int lane = threadIdx.x;
#pragma unroll 1
  for (int64_t first = 0; first < f.r; first += kRowsAtOnce) {
    const int64_t own = first + lane / kLanes;
    Pack<T, N> g[kRowsAtOnce] = {};
#pragma unroll
    for (int row = 0; row < kRowsAtOnce; ++row)
      if (const int64_t k = first + row; k < f.r)
        g[row] = load_raw<kWhole, N>(grad.data + k * grad.stride_k + i * grad.stride_i + j, f.m - j);
    const Acc scaled = own < f.r ? f.lambda[own * f.n + i] * f.scale : Acc(0);
    Acc dots[kRowsAtOnce];
#pragma unroll
    for (int row = 0; row < kRowsAtOnce; ++row) {
      Pack<TA, N> base = {};
      if (const int64_t k = first + row; k < f.r) base = load_raw<kWhole, N>(a.data + k * a.stride + j, f.m - j);
      const Acc lambda = __shfl_sync(0xFFFFFFFFu, scaled, row * kLanes);
      dots[row] = Acc(0);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const Acc t = static_cast<Acc>(g[row].v[e]) * static_cast<Acc>(base.v[e]);
        dots[row] += t * gamma[e];
        sum[e] += t * lambda;
      }
    }
    const Acc dot = sum_over_lanes(dots, lane);
    if (lane % kLanes == 0 && own < f.r) partial[own] = dot;
  }
}

// Blocks: tiles of columns x kWarps bases.
template <class T, class TA>
__global__ void __launch_bounds__(32 * kWarps, sizeof(T) == 2 ? 2 : 3)
    backward_kernel(Gradient<T> grad, BaseA<TA> a, Factors<acc_t<T>> f,
                    acc_t<T>* __restrict__ partial /* [tiles, n, r] */, acc_t<T>* __restrict__ dgamma /* [n, m] */,
                    int64_t tiles, bool gamma_vector) {
  constexpr int N = kVec<T>;
  const int64_t tile = blockIdx.x % tiles, i = blockIdx.x / tiles * kWarps + threadIdx.y;
  if (i >= f.n) return;
  const int64_t j = (tile * 32 + threadIdx.x) * N;  // where it is beyond m, every load gives zeros
  acc_t<T> gamma[N], sum[N] = {};
  load_pack(gamma, f.gamma + i * f.m + j, f.m - j, gamma_vector);
  acc_t<T>* const dots = partial + (tile * f.n + i) * f.r;
  if (grad.vector && a.vector && (tile + 1) * 32 * N <= f.m)
    backward_rows<true, N>(grad, a, f, dots, i, j, gamma, sum);
  else
    backward_rows<false, N>(grad, a, f, dots, i, j, gamma, sum);
  store_pack(dgamma + i * f.m + j, sum, f.m - j, gamma_vector);
}

// Blocks: kSumColumns elements of dlambda each; the tiles are shared by kThreads / kSumColumns threads.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    sum_tiles_kernel(const Acc* __restrict__ partial /* [tiles, n, r] */, Acc* __restrict__ dlambda /* [r, n] */,
                     int64_t tiles, int64_t n, int64_t r, Acc scale) {
  constexpr int kSlices = kThreads / kSumColumns;
  __shared__ Acc sums[kThreads];
  const int lane = int(threadIdx.x) % kSumColumns, slice = int(threadIdx.x) / kSumColumns;
  const int64_t t = int64_t(blockIdx.x) * kSumColumns + lane;
  Acc total = 0;
  if (t < n * r) {
#pragma unroll 8
    for (int64_t tile = slice; tile < tiles; tile += kSlices) total += partial[tile * n * r + t];
  }
  sums[threadIdx.x] = total;
  __syncthreads();
  if (slice > 0 || t >= n * r) return;
#pragma unroll
  for (int other = 1; other < kSlices; ++other) total += sums[other * kSumColumns + lane];
  dlambda[t % r * n + t / r] = total * scale;
}

// The kernels take A in the type of the big tensor or in that of the accumulators; anything rarer is converted, which
// costs 1/n of the traffic.
at::Tensor readable(const at::Tensor& A, at::ScalarType storage, at::ScalarType acc) {
  const bool type_fits = A.scalar_type() == storage || A.scalar_type() == acc;
  const at::Tensor typed = type_fits ? A : A.to(acc);
  return typed.stride(2) == 1 || typed.size(2) == 1 ? typed : typed.contiguous();
}

template <class T, class TA, int N>
BaseA<TA> base_of(const at::Tensor& A) {
  return {A.const_data_ptr<TA>(), A.stride(0), can_pack<TA, N>(A.const_data_ptr(), {A.stride(0)})};
}

// function(T{}, TA{}) for the storage type of the big tensor and the type of A.
template <class Function>
void with_types(at::ScalarType storage, const at::Tensor& A, const Function& function) {
  const auto with_a = [&](auto t) {
    using T = decltype(t);
    if (A.scalar_type() == storage)
      function(t, T{});
    else
      function(t, acc_t<T>{});
  };
  with_float_type(storage, with_a);
}

at::Tensor unique_base(const at::Tensor& A, const at::Tensor& lambda, const at::Tensor& gamma, double scale,
                       std::optional<at::ScalarType> dtype) {
  const UniqueBaseShape s = check_unique_base(A, lambda, gamma);
  const at::ScalarType result = unique_base_dtype(A, lambda, gamma, dtype);
  const at::ScalarType acc = accumulate_type(A, lambda, gamma, result);
  const c10::cuda::CUDAGuard guard(A.device());
  // Kernels write fp64 for fp64 arithmetic; a narrower result of fp64 inputs is rounded afterwards.
  const at::Tensor out = at::empty({s.r, s.n, s.m}, A.options().dtype(acc == at::kDouble ? acc : result));
  const at::Tensor lambda_acc = lambda.to(acc).contiguous(), gamma_acc = gamma.to(acc).contiguous();
  const at::Tensor base = readable(A, out.scalar_type(), acc);
  with_types(out.scalar_type(), base, [&](auto t, auto ta) {
    using T = decltype(t);
    using TA = decltype(ta);
    using Acc = acc_t<T>;
    constexpr int N = kVec<T>;
    const int64_t tiles = divide_up(s.m, kThreads * N);
    const Factors<Acc> factors{
        lambda_acc.const_data_ptr<Acc>(), gamma_acc.const_data_ptr<Acc>(), Acc(scale), s.r, s.n, s.m};
    launch(forward_kernel<T, TA>, {tiles * s.n * divide_up(s.r, kRowsPerThread)}, kThreads, out.mutable_data_ptr<T>(),
           base_of<T, TA, N>(base), factors, tiles, can_pack<T, N>(out.const_data_ptr(), {s.m}),
           can_pack<Acc, N>(gamma_acc.const_data_ptr(), {s.m}));
  });
  return out.to(result);
}

std::tuple<at::Tensor, at::Tensor> unique_base_backward(const at::Tensor& grad, const at::Tensor& A,
                                                        const at::Tensor& lambda, const at::Tensor& gamma, double scale,
                                                        bool need_lambda, bool need_gamma) {
  const UniqueBaseShape s = check_unique_base(A, lambda, gamma);
  check_unique_base_grad(grad, A, s);
  const at::ScalarType acc = accumulate_type(A, lambda, gamma, grad.scalar_type());
  const c10::cuda::CUDAGuard guard(A.device());
  const at::Tensor lambda_acc = lambda.to(acc).contiguous(), gamma_acc = gamma.to(acc).contiguous();
  const at::Tensor typed = acc == at::kDouble ? grad.to(acc) : grad;
  const at::Tensor big = typed.stride(2) == 1 || s.m == 1 ? typed : typed.contiguous();
  const at::Tensor base = readable(A, big.scalar_type(), acc);
  const auto options = A.options().dtype(acc);
  const at::Tensor dgamma = at::empty({s.n, s.m}, options), dlambda = at::empty({s.r, s.n}, options);
  with_types(big.scalar_type(), base, [&](auto t, auto ta) {
    using T = decltype(t);
    using TA = decltype(ta);
    using Acc = acc_t<T>;
    constexpr int N = kVec<T>;
    const int64_t tiles = divide_up(s.m, 32 * N);
    const at::Tensor partial = at::empty({tiles, s.n, s.r}, options);
    const Gradient<T> gradient{big.const_data_ptr<T>(), big.stride(0), big.stride(1),
                               can_pack<T, N>(big.const_data_ptr(), {big.stride(0), big.stride(1)})};
    const Factors<Acc> factors{
        lambda_acc.const_data_ptr<Acc>(), gamma_acc.const_data_ptr<Acc>(), Acc(scale), s.r, s.n, s.m};
    launch(backward_kernel<T, TA>, {tiles * divide_up(s.n, kWarps)}, dim3(32, kWarps), gradient,
           base_of<T, TA, N>(base), factors, partial.mutable_data_ptr<Acc>(), dgamma.mutable_data_ptr<Acc>(), tiles,
           can_pack<Acc, N>(gamma_acc.const_data_ptr(), {s.m}) && can_pack<Acc, N>(dgamma.const_data_ptr(), {s.m}));
    launch(sum_tiles_kernel<Acc>, {divide_up(s.n * s.r, kSumColumns)}, kThreads, partial.const_data_ptr<Acc>(),
           dlambda.mutable_data_ptr<Acc>(), tiles, s.n, s.r, Acc(scale));
  });
  return parameter_gradients(dlambda, dgamma, lambda, gamma, need_lambda, need_gamma);
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, CUDA, m) {
  m.impl("unique_base", &unique_base);
  m.impl("unique_base_backward", &unique_base_backward);
}

}  // namespace randlora::cuda
