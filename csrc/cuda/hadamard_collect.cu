// Hadamard bases on CUDA: from the wide side to u, as hadamard_spread.cu but the other way round. The blocks of the
// gradients take several tokens each; over all of them lambda's gradients stay in shared memory, which has more room
// for them than registers if as many blocks are to run at a time.
#include "cuda/hadamard_transform.cuh"

#include <algorithm>

namespace randlora::cuda {
namespace {

// Promised to the compiler, and for 4-byte sums more than there are: so that it takes at most 80 registers a thread,
// and the blocks of 128 threads that tokens of length 4096 have are six to a multiprocessor.
template <class Acc>
inline constexpr int kCollectThreads = sizeof(Acc) == 8 ? kTokenThreads : 768;

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
      Acc x[kPass / N][N];
#pragma unroll
      for (int part = 0; part < kPass / N; ++part)  // all of them, before the first is used
        load_pack(x[part], row + o + part * N, l.M - o - part * N, vector);
#pragma unroll
      for (int part = 0; part < kPass / N; ++part)
#pragma unroll
        for (int e = 0; e < N; ++e) v[part * N + e] += with_sign(x[part][e], signs >> (part * N + e) & 1u);
    }
    transform<4>(v);
    store_neighbours(array, at, v);
  }
  __syncthreads();
}

// Sums of a thread in shared memory, 1 << kLogGroups: element e, four side by side and between them those of the
// others.
template <class Acc>
__device__ __forceinline__ Acc* sum_at(Acc* sums, int e) {
  return sums + (e / 4 * int(blockDim.x) + int(threadIdx.x)) * 4 + e % 4;
}

template <class Acc>
int64_t bytes_of_sums(const HadamardLayout& l) {
  return (int64_t{l.threads} << kLogGroups<Acc>)*int64_t(sizeof(Acc));
}

// A column's sums from e on = those in `row`, eight loads at a time; of rows that lambda does not have, whatever is
// there.
template <int kLog, class Acc>
__device__ __forceinline__ void load_sums(const HadamardLayout& l, const Column& c, Acc* sums, int e, const Acc* row) {
  constexpr int kCount = std::min(kBatch, 1 << kLog);
  int p = c.group * l.n + c.i;
#pragma unroll
  for (int first = 0; first < 1 << kLog; first += kCount) {
    Acc values[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k, p += l.n) values[k] = row[min(p, l.P - 1)];
#pragma unroll
    for (int k = 0; k < kCount; ++k) *sum_at(sums, e + first + k) = values[k];
  }
}

// The thread's sums from e on += values.
template <int kCount, class Acc>
__device__ __forceinline__ void add_to_sums(Acc* sums, int e, const Acc (&values)[kCount]) {
  constexpr int N = kCount < 4 ? kCount : 4;
#pragma unroll
  for (int first = 0; first < kCount; first += N) {
    auto* const at = reinterpret_cast<Pack<Acc, N>*>(sum_at(sums, e + first));
    Pack<Acc, N> pack = *at;
#pragma unroll
    for (int k = 0; k < N; ++k) pack.v[k] += values[first + k];
    *at = pack;
  }
}

// One column of u from z in `array`; sum(k, p, values) for lambda's gradients of rows from k on, the first of which is
// element p, from the u that was there. Of rows that lambda does not have, values are whatever they are.
template <int kLog, bool kGradient, class T, class Sum>
__device__ __forceinline__ void collect_column(const HadamardLayout& l, const acc_t<T>* array, T* u,
                                               const acc_t<T>* table, const Column& c, const Sum& sum) {
  using Acc = acc_t<T>;
  constexpr int kCount = std::min(kBatch, 1 << kLog);
  T* const to = of_column(l, u, c);
  Acc v[1 << kLog] = {};
  if (c.i < l.n) {
    if constexpr (kGradient) {
      load_groups<kLog>(v, l, static_cast<const T*>(to));
      transform<kLog>(v);
    }
    const int slot = c.slot << l.log_length, within = (1 << l.log_length) - 1;
    int p = c.group * l.n + c.i;
#pragma unroll
    for (int first = 0; first < 1 << kLog; first += kCount) {
      Acc row[kCount], z[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        row[k] = table[p + k * l.n];
        z[k] = array[place(slot | ((p + k * l.n) & within))];
      }
      if constexpr (kGradient) {
        Acc values[kCount];
#pragma unroll
        for (int k = 0; k < kCount; ++k) values[k] = v[first + k] * z[k];
        sum(first, p, values);
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k, p += l.n) v[first + k] = c.group + first + k < l.r ? row[k] * z[k] : Acc(0);
    }
    transform<kLog>(v);
  }
#pragma unroll
  for (int g = 0; g < 1 << kLog; ++g) to[g * l.n_padded] = static_cast<T>(v[g]);
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

// Columns of a thread whose lambda has its gradients in shared memory; what is beyond adds to memory, where each
// element has one thread as well.
template <int kLog, bool kGradient, class Acc>
inline constexpr int kHeld = kGradient ? (1 << kLogGroups<Acc>) >> kLog : 0;

// function(its place among the thread's columns, the column) for those that have their sums in shared memory.
template <int kHeldColumns, class Function>
__device__ __forceinline__ void for_held_columns(const HadamardLayout& l, int64_t first_token,
                                                 const Function& function) {
  const int columns = l.n_padded << (l.log_high + l.log_slots);
#pragma unroll
  for (int held = 0; held < kHeldColumns; ++held) {
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

template <int kLog, bool kGradient, class T>
__global__ void __launch_bounds__(kCollectThreads<acc_t<T>>)
    collect_kernel(HadamardLayout l, const T* __restrict__ wide, T* u, const acc_t<T>* __restrict__ table,
                   acc_t<T>* partial, bool first, int64_t tokens, bool vector) {
  using Acc = acc_t<T>;
  constexpr int kColumns = kHeld<kLog, kGradient, Acc>;
  Acc* const array = launched_shared<Acc>();
  Acc* const sums = array + (1 << (l.log_length + l.log_slots));
  const auto row_of = [&](const Column& c) {
    return partial + ((int64_t(blockIdx.x) << l.log_slots) + c.slot) * l.P;
  };
  if constexpr (kGradient) {
    if (first) {
#pragma unroll
      for (int e = 0; e < kColumns << kLog; ++e) *sum_at(sums, e) = Acc(0);
      for_other_columns<kColumns>(l, 0, [&](const Column& c) {
        if (c.i < l.n)
          for_rows<kLog>(l, c, [&](int, int p) {
            row_of(c)[p] = Acc(0);
          });
      });
    } else {
      for_held_columns<kColumns>(l, 0, [&](int held, const Column& c) {
        if (c.i < l.n) load_sums<kLog>(l, c, sums, held << kLog, row_of(c));
      });
    }
  }

  const int64_t step = int64_t(gridDim.x) << l.log_slots;
  for (int64_t token = int64_t(blockIdx.x) << l.log_slots; token < tokens; token += step) {
    if (token + step < tokens) prefetch_rows(l, wide, token + step, tokens);
    collect_elements(l, array, wide, token, tokens, vector);
    const int length = 1 << l.log_length;  // nothing is padding here
    transform_bits<4>(array, l, length);
    transform_bits<8>(array, l, length);
    transform_bits<12>(array, l, length);
    for_held_columns<kColumns>(l, token, [&](int held, const Column& c) {
      if (c.token < tokens)
        collect_column<kLog, kGradient>(l, array, u, table, c, [&](int k, int, const auto& values) {
          add_to_sums(sums, (held << kLog) + k, values);
        });
    });
    for_other_columns<kColumns>(l, token, [&](const Column& c) {
      if (c.token < tokens)
        collect_column<kLog, kGradient>(l, array, u, table, c, [&](int k, int p, const auto& values) {
          for (const Acc value : values) {
            if (c.group + k++ < l.r) row_of(c)[p] += value;
            p += l.n;
          }
        });
    });
    __syncthreads();  // the next token overwrites the array
  }

  if constexpr (kGradient)
    for_held_columns<kColumns>(l, 0, [&](int held, const Column& c) {
      if (c.i < l.n)
        for_rows<kLog>(l, c, [&](int k, int p) {
          row_of(c)[p] = *sum_at(sums, (held << kLog) + k);
        });
    });
}

}  // namespace

template <class T>
void collect(const HadamardLayout& l, const T* wide, T* u, const acc_t<T>* table, acc_t<T>* partial, int64_t rows,
             bool first, int64_t tokens) {
  const bool vector = can_pack<T, kVec<T>>(wide, {l.M});
  const Grid grid{partial != nullptr ? rows >> l.log_slots : divide_up(tokens, int64_t{1} << l.log_slots)};
  with_log_groups<acc_t<T>>(l, [&](auto log) {
    constexpr int kLog = decltype(log)::value;
    launch(partial != nullptr ? collect_kernel<kLog, true, T> : collect_kernel<kLog, false, T>, grid,
           {l.threads, l.shared + (partial != nullptr ? bytes_of_sums<acc_t<T>>(l) : 0)}, l, wide, u, table, partial,
           first, tokens, vector);
  });
}

#define RANDLORA_INSTANTIATE(T) \
  template void collect(const HadamardLayout&, const T*, T*, const acc_t<T>*, acc_t<T>*, int64_t, bool, int64_t);
RANDLORA_HADAMARD_TYPES(RANDLORA_INSTANTIATE)

}  // namespace randlora::cuda
