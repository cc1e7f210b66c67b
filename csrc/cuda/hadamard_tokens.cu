// Hadamard bases on CUDA: the transforms. A block takes one token, or several short ones, through shared memory: 16
// elements a thread and pass, whose four levels stay in registers. Where u is read or written a thread holds the groups
// of one base i, so that their transform is one in registers too, and so are lambda's gradients, over all its tokens.
#include "cuda/hadamard.cuh"

#include <algorithm>

namespace randlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPass = 16;  // elements of a thread that are neighbours in memory
// Promised to the compiler, and for 4-byte sums more than there are: so that it takes at most 96 registers a thread,
// and the blocks of 128 threads that tokens of length 4096 have are five to a multiprocessor.
template <class Acc>
inline constexpr int kCollectThreads = sizeof(Acc) == 8 ? kTokenThreads : 640;

// Bases i of u [tokens, R, n_padded], with the groups of one thread: 2^log_groups from `group` on.
struct Column {
  int slot, group, i;
  int64_t token;
};

__device__ __forceinline__ Column column_of(const HadamardLayout& l, int index, int bases, int64_t first_token) {
  Column c;
  c.i = index % bases;
  const int rest = index / bases;
  c.slot = rest >> l.log_high;
  c.group = (rest & ((1 << l.log_high) - 1)) << (l.log_R - l.log_high);
  c.token = first_token + c.slot;
  return c;
}

template <class T>
__device__ __forceinline__ T* of_column(const HadamardLayout& l, T* u, const Column& c) {
  return u + ((c.token << l.log_R) + c.group) * l.n_padded + c.i;
}

// function(k within the column, element p of its token's transform) for the rows k of lambda that a column has.
template <int kLog, class Function>
__device__ __forceinline__ void for_rows(const HadamardLayout& l, const Column& c, const Function& function) {
  int p = c.group * l.n + c.i;
#pragma unroll
  for (int k = 0; k < 1 << kLog; ++k) {
    if (c.group + k < l.r) function(k, p);
    p += l.n;
  }
}

template <int kLog, class T>
__device__ __forceinline__ void load_groups(acc_t<T> (&v)[1 << kLog], const HadamardLayout& l, const T* from) {
#pragma unroll
  for (int g = 0; g < 1 << kLog; ++g) v[g] = static_cast<acc_t<T>>(from[g * l.n_padded]);
}

// ---- spread ----

// array[p] of each slot = table[p] v[p]
template <int kLog, class T>
__device__ __forceinline__ void spread_columns(const HadamardLayout& l, acc_t<T>* array, const T* u,
                                               const acc_t<T>* table, int64_t first_token, int64_t tokens) {
  const int columns = l.n << (l.log_high + l.log_slots);
  for (int index = int(threadIdx.x); index < columns; index += int(blockDim.x)) {
    const Column c = column_of(l, index, l.n, first_token);
    if (c.token >= tokens) continue;
    acc_t<T> v[1 << kLog];
    load_groups<kLog>(v, l, of_column(l, u, c));
    transform<kLog>(v);
    for_rows<kLog>(l, c, [&](int k, int p) {
      array[place((c.slot << l.log_length) + p)] = table[p] * v[k];
    });
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
#pragma unroll
    for (int x = 0; x < kPass; ++x) v[x] = !kPadded || within + x < l.P ? array[at ^ x] : Acc(0);
    transform<4>(v);
    T* const row = wide + token * l.M;
    for (int64_t o = within; o < l.M; o += length) {
      const uint32_t signs = uint32_t(l.b[o / 32]) >> (o % 32);
#pragma unroll
      for (int part = 0; part < kPass / N; ++part) {
        Acc y[N];
        load_pack(y, row + o + part * N, l.M - o - part * N, vector);
#pragma unroll
        for (int e = 0; e < N; ++e) y[e] += with_sign(v[part * N + e], signs >> (part * N + e) & 1u);
        store_pack(row + o + part * N, y, l.M - o - part * N, vector);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kTokenThreads)
    spread_kernel(HadamardLayout l, T* wide, const T* __restrict__ u, const acc_t<T>* __restrict__ table,
                  int64_t tokens, bool vector) {
  using Acc = acc_t<T>;
  Acc* const array = launched_shared<Acc>();
  const int64_t first_token = int64_t(blockIdx.x) << l.log_slots;
  with_log_groups<Acc>(l, [&](auto log) {
    spread_columns<decltype(log)::value>(l, array, u, table, first_token, tokens);
  });
  __syncthreads();
  transform_bits<12>(array, l, l.P);
  transform_bits<8>(array, l, l.P);
  transform_bits<4>(array, l, l.P);
  if (l.log_length == 4)
    spread_elements<true>(l, wide, array, first_token, tokens, vector);
  else
    spread_elements<false>(l, wide, array, first_token, tokens, vector);
}

// ---- collect ----

// The first pass of the transform: array [o mod L] = the sum of b_o wide [o].
template <class T>
__device__ __forceinline__ void collect_elements(const HadamardLayout& l, acc_t<T>* array, const T* wide,
                                                 int64_t first_token, int64_t tokens, bool vector) {
  using Acc = acc_t<T>;
  constexpr int N = kVec<T>;
  const int length = 1 << l.log_length;
  for (int item = int(threadIdx.x); item < (length << l.log_slots) / kPass; item += int(blockDim.x)) {
    const int start = item * kPass, at = place(start);
    const int64_t token = first_token + (start >> l.log_length);
    if (token >= tokens) continue;
    Acc v[kPass] = {};
    const T* const row = wide + token * l.M;
    for (int64_t o = start & (length - 1); o < l.M; o += length) {
      const uint32_t signs = uint32_t(l.b[o / 32]) >> (o % 32);
#pragma unroll
      for (int part = 0; part < kPass / N; ++part) {
        Acc x[N];
        load_pack(x, row + o + part * N, l.M - o - part * N, vector);
#pragma unroll
        for (int e = 0; e < N; ++e) v[part * N + e] += with_sign(x[e], signs >> (part * N + e) & 1u);
      }
    }
    transform<4>(v);
#pragma unroll
    for (int x = 0; x < kPass; ++x) array[at ^ x] = v[x];
  }
  __syncthreads();
}

// One column of u from z in `array`; sum(k, p, v z) for lambda's gradient, from the u that was there.
template <int kLog, bool kGradient, class T, class Sum>
__device__ __forceinline__ void collect_column(const HadamardLayout& l, const acc_t<T>* array, T* u,
                                               const acc_t<T>* table, const Column& c, const Sum& sum) {
  using Acc = acc_t<T>;
  T* const to = of_column(l, u, c);
  Acc v[1 << kLog] = {};
  if (c.i < l.n) {
    if constexpr (kGradient) {
      load_groups<kLog>(v, l, static_cast<const T*>(to));
      transform<kLog>(v);
    }
#pragma unroll
    for (int k = 0; k < 1 << kLog; ++k) {
      if (c.group + k >= l.r) {
        v[k] = Acc(0);
        continue;
      }
      const int p = (c.group + k) * l.n + c.i;
      const Acc z = array[place((c.slot << l.log_length) + p)];
      if constexpr (kGradient) sum(k, p, v[k] * z);
      v[k] = table[p] * z;
    }
    transform<kLog>(v);
  }
#pragma unroll
  for (int g = 0; g < 1 << kLog; ++g) to[g * l.n_padded] = static_cast<T>(v[g]);
}

// Columns of a thread whose lambda has its gradients in registers; what is beyond adds to memory, where each element
// has one thread as well.
template <int kLog, bool kGradient, class Acc>
inline constexpr int kHeld = kGradient ? (1 << kLogGroups<Acc>) >> kLog : 0;

// function(its place among the thread's columns, the column) for those that have registers.
template <int kLog, class Acc, class Function>
__device__ __forceinline__ void for_held_columns(const HadamardLayout& l, int64_t first_token,
                                                 const Function& function) {
  const int columns = l.n_padded << (l.log_high + l.log_slots);
#pragma unroll
  for (int held = 0; held < kHeld<kLog, true, Acc>; ++held) {
    const int index = int(threadIdx.x) + held * int(blockDim.x);
    if (index < columns) function(held, column_of(l, index, l.n_padded, first_token));
  }
}

// function(column) for the others.
template <int kHeldColumns, class Function>
__device__ __forceinline__ void for_other_columns(const HadamardLayout& l, int64_t first_token,
                                                  const Function& function) {
  const int columns = l.n_padded << (l.log_high + l.log_slots);
  for (int index = int(threadIdx.x) + kHeldColumns * int(blockDim.x); index < columns; index += int(blockDim.x))
    function(column_of(l, index, l.n_padded, first_token));
}

template <bool kGradient, class T>
__global__ void __launch_bounds__(kCollectThreads<acc_t<T>>)
    collect_kernel(HadamardLayout l, const T* __restrict__ wide, T* u, const acc_t<T>* __restrict__ table,
                   acc_t<T>* partial, bool first, int64_t tokens, bool vector) {
  using Acc = acc_t<T>;
  Acc* const array = launched_shared<Acc>();
  Acc sums[1 << kLogGroups<Acc>] = {};
  const auto row_of = [&](const Column& c) {
    return partial + ((int64_t(blockIdx.x) << l.log_slots) + c.slot) * l.P;
  };
  if constexpr (kGradient)
    with_log_groups<Acc>(l, [&](auto log) {
      constexpr int kLog = decltype(log)::value;
      if (first) {
        for_other_columns<kHeld<kLog, true, Acc>>(l, 0, [&](const Column& c) {
          if (c.i < l.n)
            for_rows<kLog>(l, c, [&](int, int p) {
              row_of(c)[p] = Acc(0);
            });
        });
      } else {
        for_held_columns<kLog, Acc>(l, 0, [&](int held, const Column& c) {
          if (c.i < l.n)
            for_rows<kLog>(l, c, [&](int k, int p) {
              sums[(held << kLog) + k] = row_of(c)[p];
            });
        });
      }
    });

  const int64_t step = int64_t(gridDim.x) << l.log_slots;
  for (int64_t token = int64_t(blockIdx.x) << l.log_slots; token < tokens; token += step) {
    collect_elements(l, array, wide, token, tokens, vector);
    const int length = 1 << l.log_length;  // nothing is padding here
    transform_bits<4>(array, l, length);
    transform_bits<8>(array, l, length);
    transform_bits<12>(array, l, length);
    with_log_groups<Acc>(l, [&](auto log) {
      constexpr int kLog = decltype(log)::value;
      if constexpr (kGradient)
        for_held_columns<kLog, Acc>(l, token, [&](int held, const Column& c) {
          if (c.token < tokens)
            collect_column<kLog, true>(l, array, u, table, c, [&](int k, int, Acc value) {
              sums[(held << kLog) + k] += value;
            });
        });
      for_other_columns<kHeld<kLog, kGradient, Acc>>(l, token, [&](const Column& c) {
        if (c.token < tokens)
          collect_column<kLog, kGradient>(l, array, u, table, c, [&](int, int p, Acc value) {
            row_of(c)[p] += value;
          });
      });
    });
    __syncthreads();  // the next token overwrites the array
  }

  if constexpr (kGradient)
    with_log_groups<Acc>(l, [&](auto log) {
      constexpr int kLog = decltype(log)::value;
      for_held_columns<kLog, Acc>(l, 0, [&](int held, const Column& c) {
        if (c.i < l.n)
          for_rows<kLog>(l, c, [&](int k, int p) {
            row_of(c)[p] = sums[(held << kLog) + k];
          });
      });
    });
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
  launch(spread_kernel<T>, {divide_up(tokens, int64_t{1} << l.log_slots)}, {l.threads, l.shared}, l, wide, u, table,
         tokens, vector);
}

template <class T>
void collect(const HadamardLayout& l, const T* wide, T* u, const acc_t<T>* table, acc_t<T>* partial, int64_t rows,
             bool first, int64_t tokens) {
  const bool vector = can_pack<T, kVec<T>>(wide, {l.M});
  const Grid grid{partial != nullptr ? rows >> l.log_slots : divide_up(tokens, int64_t{1} << l.log_slots)};
  launch(partial != nullptr ? collect_kernel<true, T> : collect_kernel<false, T>, grid, {l.threads, l.shared}, l, wide,
         u, table, partial, first, tokens, vector);
}

#define RANDLORA_INSTANTIATE(T)                                                        \
  template void transform_groups(const HadamardLayout&, T*, int64_t);                  \
  template void spread(const HadamardLayout&, T*, const T*, const acc_t<T>*, int64_t); \
  template void collect(const HadamardLayout&, const T*, T*, const acc_t<T>*, acc_t<T>*, int64_t, bool, int64_t);
RANDLORA_HADAMARD_TYPES(RANDLORA_INSTANTIATE)

}  // namespace randlora::cuda
