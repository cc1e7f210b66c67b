// Hadamard bases on CUDA: columns in the order of groups and back, what belongs around the products, and the products
// of a few tokens. Column j = (q R + g) w + e is element q w + e of group g, so that w columns move at once.
#include "cuda/hadamard.cuh"

namespace randlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSumColumns = 32;  // of a block that adds rows up

// function(constant) with w.
template <class Function>
void with_width(const HadamardLayout& l, const Function& function) {
  switch (l.log_w) {
    case 0: return function(std::integral_constant<int, 1>{});
    case 1: return function(std::integral_constant<int, 2>{});
    case 2: return function(std::integral_constant<int, 4>{});
    default: return function(std::integral_constant<int, 8>{});
  }
}

// to [R, K], groups `stride` apart = from [m], or zeros if null; signed by a if `sign`.
template <int W, class T, class From>
__device__ __forceinline__ void group_row(const HadamardLayout& l, T* to, int64_t stride, const From* from, bool sign,
                                          bool vector, bool to_vector) {
  using Acc = acc_t<T>;
  const int units = l.K / W;
  for (int index = int(threadIdx.x); index < units << l.log_R; index += int(blockDim.x)) {
    const int g = index / units, q = index - g * units;  // neighbours write neighbours
    const int64_t j = ((int64_t(q) << l.log_R) + g) * W;
    Acc v[W];
    load_pack(v, from + j, from != nullptr ? l.m - j : 0, vector);
    if (sign && j < l.m) {
      const uint32_t signs = uint32_t(l.a[j / 32]) >> (j % 32);
#pragma unroll
      for (int e = 0; e < W; ++e) v[e] = with_sign(v[e], signs >> e & 1u);
    }
    store_pack(to + g * stride + q * W, v, W, to_vector);
  }
}

int table_blocks(const HadamardLayout& l) { return int(divide_up(l.n << l.log_R, kThreads)); }

template <class T>
__device__ __forceinline__ void make_table(const HadamardLayout& l, const HadamardParameters<T>& p, int block) {
  const int index = block * kThreads + int(threadIdx.x);
  if (index < l.P)
    p.table[index] = with_sign(p.scale * p.lambda[index], minus(l.c, index));
  else if (index < l.n << l.log_R)
    p.table[index] = acc_t<T>(0);
}

// Blocks: the rows of gamma (padding included), `tables` of the table, a token each.
template <class T, int W>
__global__ void __launch_bounds__(kThreads)
    group_kernel(HadamardLayout l, HadamardParameters<T> p, int rows, int tables, const T* __restrict__ x, T* grouped,
                 bool gamma_vector, bool x_vector) {
  const int64_t block = blockIdx.x;
  if (block < rows) {
    group_row<W>(l, p.grouped + block * l.K, int64_t(l.n_padded) * l.K,
                 block < l.n ? p.gamma + block * l.m : static_cast<const acc_t<T>*>(nullptr), true, gamma_vector, true);
  } else if (block < rows + tables) {
    make_table(l, p, int(block) - rows);
  } else {
    const int64_t token = block - rows - tables;
    group_row<W>(l, grouped + (token << l.log_R) * l.K, l.K, x + token * l.m, false, x_vector, true);
  }
}

template <class T, int W>
__global__ void __launch_bounds__(kThreads)
    ungroup_kernel(HadamardLayout l, T* out, const T* __restrict__ grouped, bool vector) {
  const int64_t token = blockIdx.x;
  for (int64_t j = int64_t(threadIdx.x) * W; j < l.m; j += int64_t(kThreads) * W) {
    const int64_t unit = j / W, g = unit & ((1 << l.log_R) - 1), q = unit >> l.log_R;
    acc_t<T> v[W], y[W];
    load_pack(v, grouped + ((token << l.log_R) + g) * l.K + q * W, W, true);
    load_pack(y, out + token * l.m + j, l.m - j, vector);
#pragma unroll
    for (int e = 0; e < W; ++e) y[e] += v[e];
    store_pack(out + token * l.m + j, y, l.m - j, vector);
  }
}

// Blocks: `bases` rows of dgamma, then kSumColumns elements of dlambda each.
template <class Acc, int W>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(HadamardLayout l, int bases, Acc* dgamma, const Acc* __restrict__ grouped, bool add, Acc* dlambda,
                  const Acc* __restrict__ partial, int64_t rows, Acc scale, bool vector) {
  __shared__ Acc sums[kThreads];
  if (int(blockIdx.x) < bases) {
    const int64_t i = blockIdx.x;
    for (int64_t j = int64_t(threadIdx.x) * W; j < l.m; j += int64_t(kThreads) * W) {
      const int64_t unit = j / W, g = unit & ((1 << l.log_R) - 1), q = unit >> l.log_R;
      const uint32_t signs = uint32_t(l.a[j / 32]) >> (j % 32);
      Acc v[W], sum[W] = {};
      load_pack(v, grouped + (g * l.n_padded + i) * l.K + q * W, W, true);
      if (add) load_pack(sum, dgamma + i * l.m + j, l.m - j, vector);
#pragma unroll
      for (int e = 0; e < W; ++e) sum[e] += with_sign(v[e], signs >> e & 1u);
      store_pack(dgamma + i * l.m + j, sum, l.m - j, vector);
    }
    return;
  }
  constexpr int kSlices = kThreads / kSumColumns;
  const int lane = int(threadIdx.x) % kSumColumns, slice = int(threadIdx.x) / kSumColumns;
  const int p = (int(blockIdx.x) - bases) * kSumColumns + lane;
  Acc sum = Acc(0);
  if (p < l.P) {
#pragma unroll 8
    for (int64_t row = slice; row < rows; row += kSlices) sum += partial[row * l.P + p];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (slice > 0 || p >= l.P) return;
#pragma unroll
  for (int other = 1; other < kSlices; ++other) sum += sums[other * kSumColumns + lane];
  dlambda[p] = with_sign(scale * sum, minus(l.c, p));
}

// ---- a few tokens ----

// Blocks: a base i each, then those of the table. A thread walks over the w columns of one group at a time.
template <class T, int W>
__global__ void __launch_bounds__(kThreads)
    few_up_kernel(HadamardLayout l, HadamardParameters<T> p, T* u, const T* __restrict__ x, int tokens,
                  bool gamma_vector, bool x_vector) {
  using Acc = acc_t<T>;
  __shared__ Acc sums[kFewTokens][kThreads];
  const int i = int(blockIdx.x), R = 1 << l.log_R;
  if (i >= l.n) return make_table(l, p, i - l.n);
  Acc sum[kFewTokens] = {};
  for (int64_t j = int64_t(threadIdx.x) * W; j < l.m; j += int64_t(kThreads) * W) {
    const uint32_t signs = uint32_t(l.a[j / 32]) >> (j % 32);
    Acc gamma[W];
    load_pack(gamma, p.gamma + int64_t(i) * l.m + j, l.m - j, gamma_vector);
#pragma unroll
    for (int e = 0; e < W; ++e) gamma[e] = with_sign(gamma[e], signs >> e & 1u);
#pragma unroll
    for (int t = 0; t < kFewTokens; ++t) {
      if (t >= tokens) break;
      Acc v[W];
      load_pack(v, x + int64_t(t) * l.m + j, l.m - j, x_vector);
#pragma unroll
      for (int e = 0; e < W; ++e) sum[t] += gamma[e] * v[e];
    }
  }
#pragma unroll
  for (int t = 0; t < kFewTokens; ++t) sums[t][threadIdx.x] = sum[t];
  __syncthreads();
  for (int index = int(threadIdx.x); index < tokens << l.log_R; index += kThreads) {
    const int t = index >> l.log_R, g = index & (R - 1);
    Acc total = Acc(0);
    for (int thread = g; thread < kThreads; thread += R) total += sums[t][thread];
    u[int64_t(index) * l.n_padded + i] = static_cast<T>(total);
  }
}

// A block: kSumColumns columns j; its warps share the bases i.
template <class T>
__global__ void __launch_bounds__(kThreads) few_down_kernel(HadamardLayout l, const acc_t<T>* __restrict__ gamma,
                                                            T* out, const T* __restrict__ du, int tokens) {
  using Acc = acc_t<T>;
  constexpr int kSlices = kThreads / kSumColumns;
  __shared__ Acc sums[kSlices][kFewTokens][kSumColumns];
  const int lane = int(threadIdx.x) % kSumColumns, slice = int(threadIdx.x) / kSumColumns;
  const int64_t j = int64_t(blockIdx.x) * kSumColumns + lane;
  const int g = int(j >> l.log_w) & ((1 << l.log_R) - 1);
  Acc sum[kFewTokens] = {};
  if (j < l.m) {
#pragma unroll 4
    for (int i = slice; i < l.n; i += kSlices) {
      const Acc c = gamma[int64_t(i) * l.m + j];
#pragma unroll
      for (int t = 0; t < kFewTokens; ++t) {
        if (t >= tokens) break;
        sum[t] += c * static_cast<Acc>(du[((int64_t(t) << l.log_R) + g) * l.n_padded + i]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kFewTokens; ++t) sums[slice][t][lane] = sum[t];
  __syncthreads();
  if (slice >= tokens || j >= l.m) return;
  static_assert(kSlices >= kFewTokens, "a warp finishes a token");
  Acc total = Acc(0);
#pragma unroll
  for (int other = 0; other < kSlices; ++other) total += sums[other][slice][lane];
  T* const to = out + int64_t(slice) * l.m + j;
  *to = static_cast<T>(static_cast<Acc>(*to) + with_sign(total, minus(l.a, j)));
}

// ---- unit vectors, for dW ----

// Blocks: a column j each.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    unit_up_kernel(HadamardLayout l, Acc* u, const Acc* __restrict__ gamma, int64_t first) {
  const int64_t j = first + blockIdx.x;
  const int group = int(j >> l.log_w) & ((1 << l.log_R) - 1);
  const bool negative = minus(l.a, j);
  Acc* const to = u + (int64_t(blockIdx.x) << l.log_R) * l.n_padded;
  for (int index = int(threadIdx.x); index < l.n_padded << l.log_R; index += kThreads) {
    const int g = index / l.n_padded, i = index - g * l.n_padded;
    to[index] = g == group && i < l.n ? with_sign(gamma[int64_t(i) * l.m + j], negative) : Acc(0);
  }
}

// Threads: columns j along x, bases i along y.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    unit_gradient_kernel(HadamardLayout l, Acc* dgamma, const Acc* __restrict__ du, int64_t first, int64_t count) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x, j = first + index;
  if (index >= count) return;
  const int g = int(j >> l.log_w) & ((1 << l.log_R) - 1);
  const bool negative = minus(l.a, j);
  const Acc* const from = du + ((index << l.log_R) + g) * l.n_padded;
  for (int64_t i = blockIdx.y; i < l.n; i += gridDim.y) dgamma[i * l.m + j] = with_sign(from[i], negative);
}

}  // namespace

template <class T>
void group(const HadamardLayout& l, const HadamardParameters<T>& p, bool parameters, const T* x, T* grouped,
           int64_t tokens) {
  const int rows = parameters && p.grouped != nullptr ? l.n_padded : 0;
  const int tables = parameters ? table_blocks(l) : 0;
  if (rows + tables + tokens == 0) return;
  with_width(l, [&](auto w) {
    constexpr int W = decltype(w)::value;
    launch(group_kernel<T, W>, {rows + tables + tokens}, kThreads, l, p, rows, tables, x, grouped,
           can_pack<acc_t<T>, W>(p.gamma, {l.m}), can_pack<T, W>(x, {l.m}));
  });
}

template <class T>
void ungroup(const HadamardLayout& l, T* out, const T* grouped, int64_t tokens) {
  with_width(l, [&](auto w) {
    constexpr int W = decltype(w)::value;
    launch(ungroup_kernel<T, W>, {tokens}, kThreads, l, out, grouped, can_pack<T, W>(out, {l.m}));
  });
}

template <class Acc>
void finish_gradients(const HadamardLayout& l, Acc* dgamma, const Acc* grouped, bool add, Acc* dlambda,
                      const Acc* partial, int64_t rows, Acc scale) {
  const int bases = dgamma != nullptr ? l.n : 0;
  const int64_t sums = dlambda != nullptr ? divide_up(l.P, kSumColumns) : 0;
  with_width(l, [&](auto w) {
    constexpr int W = decltype(w)::value;
    launch(finish_kernel<Acc, W>, {bases + sums}, kThreads, l, bases, dgamma, grouped, add, dlambda, partial, rows,
           scale, can_pack<Acc, W>(dgamma, {l.m}));
  });
}

template <class T>
void few_products_up(const HadamardLayout& l, const HadamardParameters<T>& p, T* u, const T* x, int64_t tokens) {
  with_width(l, [&](auto w) {
    constexpr int W = decltype(w)::value;
    launch(few_up_kernel<T, W>, {l.n + table_blocks(l)}, kThreads, l, p, u, x, int(tokens),
           can_pack<acc_t<T>, W>(p.gamma, {l.m}), can_pack<T, W>(x, {l.m}));
  });
}

template <class T>
void few_products_down(const HadamardLayout& l, const HadamardParameters<T>& p, T* out, const T* du, int64_t tokens) {
  launch(few_down_kernel<T>, {divide_up(l.m, kSumColumns)}, kThreads, l, p.gamma, out, du, int(tokens));
}

template <class Acc>
void unit_products_up(const HadamardLayout& l, Acc* u, const Acc* gamma, int64_t first, int64_t count) {
  launch(unit_up_kernel<Acc>, {count}, kThreads, l, u, gamma, first);
}

template <class Acc>
void unit_gradients(const HadamardLayout& l, Acc* dgamma, const Acc* du, int64_t first, int64_t count) {
  launch(unit_gradient_kernel<Acc>, {divide_up(count, kThreads), std::min<int64_t>(l.n, 65535)}, kThreads, l, dgamma,
         du, first, count);
}

#define RANDLORA_INSTANTIATE(T)                                                                              \
  template void group(const HadamardLayout&, const HadamardParameters<T>&, bool, const T*, T*, int64_t);     \
  template void ungroup(const HadamardLayout&, T*, const T*, int64_t);                                       \
  template void few_products_up(const HadamardLayout&, const HadamardParameters<T>&, T*, const T*, int64_t); \
  template void few_products_down(const HadamardLayout&, const HadamardParameters<T>&, T*, const T*, int64_t);
RANDLORA_HADAMARD_TYPES(RANDLORA_INSTANTIATE)
#undef RANDLORA_INSTANTIATE

#define RANDLORA_INSTANTIATE(Acc)                                                                                \
  template void finish_gradients(const HadamardLayout&, Acc*, const Acc*, bool, Acc*, const Acc*, int64_t, Acc); \
  template void unit_products_up(const HadamardLayout&, Acc*, const Acc*, int64_t, int64_t);                     \
  template void unit_gradients(const HadamardLayout&, Acc*, const Acc*, int64_t, int64_t);
RANDLORA_INSTANTIATE(float)
RANDLORA_INSTANTIATE(double)

}  // namespace randlora::cuda
