// Hadamard bases on CUDA: from u to the wide side. A block takes one token, or several short ones, through shared
// memory: 16 elements a thread and pass, whose four levels stay in registers. Where u is read a thread holds the groups
// of one base i, so that their transform is one in registers too.
#include "cuda/hadamard_transform.cuh"

#include <algorithm>

namespace randlora::cuda {
namespace {

constexpr int kThreads = 256;

// Promised to the compiler, and for 4-byte sums more than there are: so that it takes at most 72 registers a thread,
// and seven blocks of 128 threads run on a multiprocessor.
template <class Acc>
inline constexpr int kSpreadThreads = sizeof(Acc) == 8 ? kTokenThreads : 896;

// array[p] of each slot = table[p] v[p]; rows that lambda does not have are zeros, or beyond the slot, and go nowhere.
template <int kLog, class T>
__device__ __forceinline__ void spread_columns(const HadamardLayout& l, acc_t<T>* array, const T* u,
                                               const acc_t<T>* table, int64_t first_token, int64_t tokens) {
  using Acc = acc_t<T>;
  const int columns = l.n << (l.log_high + l.log_slots), length = 1 << l.log_length;
  const int nowhere = (length << l.log_slots) + int(threadIdx.x);
  for (int index = int(threadIdx.x); index < columns; index += int(blockDim.x)) {
    const Column c = column_of(l, index, l.n, first_token);
    if (c.token >= tokens) continue;
    Acc v[1 << kLog];
    load_groups<kLog>(v, l, of_column(l, u, c));
    transform<kLog>(v);
    int p = c.group * l.n + c.i;
#pragma unroll
    for (int first = 0; first < 1 << kLog; first += kBatch) {
      Acc row[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch && first + k < 1 << kLog; ++k) row[k] = table[p + k * l.n];
#pragma unroll
      for (int k = 0; k < kBatch && first + k < 1 << kLog; ++k, p += l.n)  // without a question for each store
        array[p < length ? place((c.slot << l.log_length) + p) : nowhere] = row[k] * v[first + k];
    }
  }
}

// The last pass of the transform, with what it is for: wide [o] += b_o array [o mod L].
template <bool kPadded, class T>
__device__ __forceinline__ void spread_elements(const HadamardLayout& l, T* wide, const acc_t<T>* array,
                                                int64_t first_token, int64_t tokens, bool vector) {
  using Acc = acc_t<T>;
  constexpr int N = kVec<T>;
  const int length = 1 << l.log_length;
  for (int item = int(threadIdx.x); item < (length << l.log_slots) / kPass; item += int(blockDim.x)) {
    const int start = item * kPass, within = start & (length - 1), at = place(start);
    const int64_t token = first_token + (start >> l.log_length);
    if (token >= tokens) continue;
    Acc v[kPass];
    load_neighbours(v, array, at);
#pragma unroll
    for (int x = 0; x < kPass; ++x)
      if (kPadded && within + x >= l.P) v[x] = Acc(0);
    transform<4>(v);
    T* const row = wide + token * l.M;
    for (int64_t o = within; o < l.M; o += length) {
      const uint32_t signs = uint32_t(l.b[o / 32]) >> (o % 32);
      Acc y[kPass / N][N];
#pragma unroll
      for (int part = 0; part < kPass / N; ++part)  // all of them, before the first is used
        load_pack(y[part], row + o + part * N, l.M - o - part * N, vector);
#pragma unroll
      for (int part = 0; part < kPass / N; ++part) {
#pragma unroll
        for (int e = 0; e < N; ++e) y[part][e] += with_sign(v[part * N + e], signs >> (part * N + e) & 1u);
        store_pack(row + o + part * N, y[part], l.M - o - part * N, vector);
      }
    }
  }
}

template <int kLog, class T>
__global__ void __launch_bounds__(kSpreadThreads<acc_t<T>>, 1)
    spread_kernel(HadamardLayout l, T* wide, const T* __restrict__ u, const acc_t<T>* __restrict__ table,
                  int64_t tokens, bool vector) {
  using Acc = acc_t<T>;
  Acc* const array = launched_shared<Acc>();
  const int64_t first_token = int64_t(blockIdx.x) << l.log_slots;
  prefetch_rows(l, wide, first_token, tokens);
  spread_columns<kLog>(l, array, u, table, first_token, tokens);
  __syncthreads();
  transform_bits<12>(array, l, l.P);
  transform_bits<8>(array, l, l.P);
  transform_bits<4>(array, l, l.P);
  if (l.log_length == 4)
    spread_elements<true>(l, wide, array, first_token, tokens, vector);
  else
    spread_elements<false>(l, wide, array, first_token, tokens, vector);
}

// ---- more groups than a thread holds ----

// u [outer, 2^kLog, inner] transformed over the middle.
template <int kLog, class T>
__global__ void __launch_bounds__(kThreads) transform_groups_kernel(T* u, int64_t outer, int64_t inner) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x; item < outer * inner; item += step) {
    const int64_t row = item / inner;
    T* const at = u + (row << kLog) * inner + (item - row * inner);
    acc_t<T> v[1 << kLog];
#pragma unroll
    for (int x = 0; x < 1 << kLog; ++x) v[x] = static_cast<acc_t<T>>(at[x * inner]);
    transform<kLog>(v);
#pragma unroll
    for (int x = 0; x < 1 << kLog; ++x) at[x * inner] = static_cast<T>(v[x]);
  }
}

}  // namespace

template <class T>
void transform_groups(const HadamardLayout& l, T* u, int64_t tokens) {
  for (int bit = l.log_R - l.log_high; bit < l.log_R; bit += 4) {
    const int bits = std::min(4, l.log_R - bit);
    const int64_t inner = int64_t(l.n_padded) << bit, outer = tokens << (l.log_R - bit - bits);
    const Grid grid{std::min<int64_t>(132 * 32, divide_up(outer * inner, kThreads))};
    const auto run = [&](auto log) {
      launch(transform_groups_kernel<decltype(log)::value, T>, grid, kThreads, u, outer, inner);
    };
    switch (bits) {
      case 1: run(std::integral_constant<int, 1>{}); break;
      case 2: run(std::integral_constant<int, 2>{}); break;
      case 3: run(std::integral_constant<int, 3>{}); break;
      default: run(std::integral_constant<int, 4>{}); break;
    }
  }
}

template <class T>
void spread(const HadamardLayout& l, T* wide, const T* u, const acc_t<T>* table, int64_t tokens) {
  const bool vector = can_pack<T, kVec<T>>(wide, {l.M});
  with_log_groups<acc_t<T>>(l, [&](auto log) {
    launch(spread_kernel<decltype(log)::value, T>, {divide_up(tokens, int64_t{1} << l.log_slots)},
           {l.threads, l.shared + l.threads * int64_t(sizeof(acc_t<T>))}, l, wide, u, table, tokens, vector);
  });
}

#define RANDLORA_INSTANTIATE(T)                                       \
  template void transform_groups(const HadamardLayout&, T*, int64_t); \
  template void spread(const HadamardLayout&, T*, const T*, const acc_t<T>*, int64_t);
RANDLORA_HADAMARD_TYPES(RANDLORA_INSTANTIATE)

}  // namespace randlora::cuda
