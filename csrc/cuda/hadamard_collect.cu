// Hadamard bases on CUDA: from the wide side to u, as hadamard_spread.cu but the other way round. The blocks of the
// gradients take several tokens each, and lambda's gradients stay in registers over all of them.
#include "cuda/hadamard.cuh"

#include <algorithm>

namespace randlora::cuda {
namespace {

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
    const int slot = c.slot << l.log_length, within = (1 << l.log_length) - 1;
    int p = c.group * l.n + c.i;
#pragma unroll
    for (int first = 0; first < 1 << kLog; first += kBatch) {
      Acc row[kBatch], z[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch && first + k < 1 << kLog; ++k) {
        row[k] = table[p + k * l.n];
        z[k] = array[place(slot | ((p + k * l.n) & within))];
      }
#pragma unroll
      for (int k = 0; k < kBatch && first + k < 1 << kLog; ++k, p += l.n) {
        const bool real = c.group + first + k < l.r;
        if constexpr (kGradient)
          if (real) sum(first + k, p, v[first + k] * z[k]);
        v[first + k] = real ? row[k] * z[k] : Acc(0);
      }
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

// Columns of a thread whose lambda has its gradients in registers; what is beyond adds to memory, where each element
// has one thread as well.
template <int kLog, bool kGradient, class Acc>
inline constexpr int kHeld = kGradient ? (1 << kLogGroups<Acc>) >> kLog : 0;

// function(its place among the thread's columns, the column) for those that have registers.
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
__global__ void __launch_bounds__(kTokenThreads)
    collect_kernel(HadamardLayout l, const T* __restrict__ wide, T* u, const acc_t<T>* __restrict__ table,
                   acc_t<T>* partial, bool first, int64_t tokens, bool vector) {
  using Acc = acc_t<T>;
  constexpr int kColumns = kHeld<kLog, kGradient, Acc>;
  Acc* const array = launched_shared<Acc>();
  Acc sums[kGradient ? kColumns << kLog : 1] = {};
  const auto row_of = [&](const Column& c) {
    return partial + ((int64_t(blockIdx.x) << l.log_slots) + c.slot) * l.P;
  };
  if constexpr (kGradient) {
    if (first) {
      for_other_columns<kColumns>(l, 0, [&](const Column& c) {
        if (c.i < l.n)
          for_rows<kLog>(l, c, [&](int, int p) {
            row_of(c)[p] = Acc(0);
          });
      });
    } else {
      for_held_columns<kColumns>(l, 0, [&](int held, const Column& c) {
        if (c.i < l.n)
          for_rows<kLog>(l, c, [&](int k, int p) {
            sums[(held << kLog) + k] = row_of(c)[p];
          });
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
        collect_column<kLog, kGradient>(l, array, u, table, c, [&](int k, int, Acc value) {
          sums[(held << kLog) + k] += value;
        });
    });
    for_other_columns<kColumns>(l, token, [&](const Column& c) {
      if (c.token < tokens)
        collect_column<kLog, kGradient>(l, array, u, table, c, [&](int, int p, Acc value) {
          row_of(c)[p] += value;
        });
    });
    __syncthreads();  // the next token overwrites the array
  }

  if constexpr (kGradient)
    for_held_columns<kColumns>(l, 0, [&](int held, const Column& c) {
      if (c.i < l.n)
        for_rows<kLog>(l, c, [&](int k, int p) {
          row_of(c)[p] = sums[(held << kLog) + k];
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
           {l.threads, l.shared}, l, wide, u, table, partial, first, tokens, vector);
  });
}

#define RANDLORA_INSTANTIATE(T) \
  template void collect(const HadamardLayout&, const T*, T*, const acc_t<T>*, acc_t<T>*, int64_t, bool, int64_t);
RANDLORA_HADAMARD_TYPES(RANDLORA_INSTANTIATE)

}  // namespace randlora::cuda
