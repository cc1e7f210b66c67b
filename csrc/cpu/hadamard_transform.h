// Fast Walsh-Hadamard transforms in place: y[o] = sum_q (-1)^popcount(o & q) x[q]. A pass over memory does up to four
// levels in registers; the first pass does the levels inside of vectors as well.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/vec.h"

namespace randlora::cpu {

template <class V, int Radix, int Half = 1>
RANDLORA_INLINE void butterflies(V (&v)[Radix]) {
  if constexpr (Half < Radix) {
#pragma GCC unroll 16
    for (int i = 0; i < Radix; ++i) {
      if (i & Half) continue;
      const V sum = v[i] + v[i + Half];
      v[i + Half] = v[i] - v[i + Half];
      v[i] = sum;
    }
    butterflies<V, Radix, 2 * Half>(v);
  }
}

template <int Half, class V, int... Lane>
RANDLORA_INLINE V level_inside(V v, std::integer_sequence<int, Lane...>) {
  const V signs = {(Lane & Half ? -1 : 1)...};
  return v * signs + __builtin_shufflevector(v, v, (Lane ^ Half)...);
}

template <class V, int Lanes, int Half = 1>
RANDLORA_INLINE V transform_inside(V v) {
  if constexpr (Half < Lanes)
    return transform_inside<V, Lanes, 2 * Half>(level_inside<Half>(v, std::make_integer_sequence<int, Lanes>{}));
  else
    return v;
}

// Transforms `Radix` rows that are `stride` elements apart; Inside: the levels inside of vectors as well.
template <class Acc, int Bytes, int Radix, bool Inside>
RANDLORA_INLINE void transform_pass(Acc* data, int64_t total, int64_t stride) {
  constexpr int L = kLanes<Acc, Bytes>;
  using V = Vec<Acc, Bytes>;
  for (Acc* block = data; block < data + total; block += Radix * stride)
    for (Acc* p = block; p < block + stride; p += L) {
      V v[Radix];
#pragma GCC unroll 16
      for (int i = 0; i < Radix; ++i) {
        v[i] = load_bits<V>(p + i * stride);
        if constexpr (Inside) v[i] = transform_inside<V, L>(v[i]);
      }
      butterflies<V, Radix>(v);
#pragma GCC unroll 16
      for (int i = 0; i < Radix; ++i) store_bits(p + i * stride, v[i]);
    }
}

template <class Acc, int Bytes, int Most, bool Inside>
RANDLORA_INLINE void transform_pass(int levels, Acc* data, int64_t total, int64_t stride) {
  switch (levels) {
    case 0: return transform_pass<Acc, Bytes, 1, Inside>(data, total, stride);
    case 1: return transform_pass<Acc, Bytes, 2, Inside>(data, total, stride);
    case 2: return transform_pass<Acc, Bytes, 4, Inside>(data, total, stride);
    case 3: return transform_pass<Acc, Bytes, 8, Inside>(data, total, stride);
    default:
      if constexpr (Most == 4) transform_pass<Acc, Bytes, 16, Inside>(data, total, stride);
  }
}

// All levels over `rows` rows of `width` elements, at most `Most` of them in a pass.
template <class Acc, int Bytes, int Most>
RANDLORA_INLINE void transform_levels(Acc* data, int levels, int64_t total, int64_t stride) {
  while (levels > 0) {
    const int passes = (levels + Most - 1) / Most, now = (levels + passes - 1) / passes;
    transform_pass<Acc, Bytes, Most, false>(now, data, total, stride);
    stride <<= now;
    levels -= now;
  }
}

inline int log2_of(int64_t power) { return __builtin_ctzll(uint64_t(power)); }

// Transforms along the first axis of data [rows, width]; rows is a power of two, width a multiple of kLanes<Acc>.
template <class Acc, int Bytes, int Most>
struct TransformRows {
  static RANDLORA_INLINE void run(Acc* data, int64_t rows, int64_t width) {
    transform_levels<Acc, Bytes, Most>(data, log2_of(rows), rows * width, width);
  }
};

// Transforms a vector; length is a power of two, at least kLanes<Acc>.
template <class Acc, int Bytes, int Most>
struct TransformVector {
  static RANDLORA_INLINE void run(Acc* data, int64_t length) {
    constexpr int L = kLanes<Acc, Bytes>;
    const int levels = log2_of(length / L), passes = std::max(1, (levels + Most - 1) / Most);
    const int first = (levels + passes - 1) / passes;
    transform_pass<Acc, Bytes, Most, true>(first, data, length, L);
    transform_levels<Acc, Bytes, Most>(data, levels - first, length, int64_t{L} << first);
  }
};

template <class Acc>
void transform_rows(Acc* data, int64_t rows, int64_t width) {
  if (rows > 1)
    run_fitted<TransformRows<Acc, 64, 4>, TransformRows<Acc, 32, 3>, TransformRows<Acc, 16, 3>>(data, rows, width);
}

template <class Acc>
void transform_vector(Acc* data, int64_t length) {
  run_fitted<TransformVector<Acc, 64, 4>, TransformVector<Acc, 32, 3>, TransformVector<Acc, 16, 3>>(data, length);
}

}  // namespace randlora::cpu
