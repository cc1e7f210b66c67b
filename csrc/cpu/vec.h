// Vectors of 16 floats (or 8 doubles), made with the compilers' vector extension: the same code for every instruction
// set, which groups sums in the same way on each of them. Sums are fp32 (fp64 for fp64), whatever the storage type.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/isa.h"
#include "dtypes.h"

#if defined(__GNUC__) && !defined(__clang__)
// Vectors are only passed between functions that are inlined, so no calling convention is involved.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace randlora::cpu {

template <class Acc, int Bytes>
struct VecOf {
  typedef Acc type __attribute__((vector_size(Bytes)));
};
// Where sums are kept in many vectors at once, `Bytes` should be the width of the registers: compilers keep wider
// vectors on the stack.
template <class Acc, int Bytes = 64>
using Vec = typename VecOf<Acc, Bytes>::type;
template <class Acc, int Bytes = 64>
inline constexpr int kLanes = Bytes / int(sizeof(Acc));

typedef float F32x16 __attribute__((vector_size(64)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));
typedef int32_t I32x16 __attribute__((vector_size(64)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));

template <class V, class T>
RANDLORA_INLINE V load_bits(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class T>
RANDLORA_INLINE void store_bits(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

template <class To, class From>
RANDLORA_INLINE To bits_of(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof(To));
  return to;
}

// ---- 16-bit floats, exactly as c10 rounds them (nearest even, NaN stays NaN), without branches ----

RANDLORA_INLINE F32x16 widen_bf16(U16x16 h) { return bits_of<F32x16>(__builtin_convertvector(h, U32x16) << 16); }

RANDLORA_INLINE U16x16 narrow_bf16(F32x16 f) {
  const U32x16 w = bits_of<U32x16>(f);
  const U32x16 rounded = (w + (0x7FFFu + ((w >> 16) & 1u))) >> 16;
  const U32x16 nan = rounded * 0u + 0x7FC0u;
  return __builtin_convertvector((w & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded, U16x16);
}

RANDLORA_INLINE F32x16 widen_fp16(U16x16 h16) {
  const U32x16 h = __builtin_convertvector(h16, U32x16);
  const U32x16 sign = (h & 0x8000u) << 16;
  // 2^112 moves the exponent from fp16's bias to fp32's, subnormals included; 65536 and above were inf or NaN.
  const F32x16 scaled = bits_of<F32x16>((h & 0x7FFFu) << 13) * 0x1p112f;
  const U32x16 magnitude = bits_of<U32x16>(scaled);
  return bits_of<F32x16>((scaled >= 65536.0f ? magnitude | 0x7F800000u : magnitude) | sign);
}

RANDLORA_INLINE U16x16 narrow_fp16(F32x16 f) {
  const U32x16 w = bits_of<U32x16>(f);
  const U32x16 twice = w + w;
  // Adding 2^(exponent + 13) lets the hardware's own rounding drop the bits that fp16 has no room for; the floor of
  // the added number makes fp16's subnormals come out right, the detour over 2^112 its overflow to infinity.
  const F32x16 magnitude = bits_of<F32x16>(w & 0x7FFFFFFFu) * 0x1p112f * 0x1p-110f;
  const U32x16 exponent = twice & 0xFF000000u;
  const U32x16 floor = exponent * 0u + 0x71000000u;
  const U32x16 bias = exponent > floor ? exponent : floor;
  const U32x16 sum = bits_of<U32x16>(bits_of<F32x16>((bias >> 1) + 0x07800000u) + magnitude);
  const U32x16 number = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  const U32x16 nan = floor * 0u + 0x7E00u;
  return __builtin_convertvector(((w >> 16) & 0x8000u) | (twice > 0xFF000000u ? nan : number), U16x16);
}

// ---- kLanes consecutive elements of storage type T, as accumulators ----

RANDLORA_INLINE Vec<float> load(const float* p) { return load_bits<Vec<float>>(p); }
RANDLORA_INLINE Vec<double> load(const double* p) { return load_bits<Vec<double>>(p); }
RANDLORA_INLINE Vec<float> load(const c10::BFloat16* p) { return widen_bf16(load_bits<U16x16>(p)); }
RANDLORA_INLINE Vec<float> load(const c10::Half* p) { return widen_fp16(load_bits<U16x16>(p)); }

RANDLORA_INLINE void store(float* p, Vec<float> v) { store_bits(p, v); }
RANDLORA_INLINE void store(double* p, Vec<double> v) { store_bits(p, v); }
RANDLORA_INLINE void store(c10::BFloat16* p, Vec<float> v) { store_bits(p, narrow_bf16(v)); }
RANDLORA_INLINE void store(c10::Half* p, Vec<float> v) { store_bits(p, narrow_fp16(v)); }

// The first `count` < kLanes elements; the others read as zero and are not written.
template <class T>
RANDLORA_INLINE Vec<acc_t<T>> load_some(const T* p, int64_t count) {
  T buffer[kLanes<acc_t<T>>] = {};
  std::memcpy(buffer, p, size_t(count) * sizeof(T));
  return load(buffer);
}

template <class T>
RANDLORA_INLINE void store_some(T* p, Vec<acc_t<T>> v, int64_t count) {
  T buffer[kLanes<acc_t<T>>];
  store(buffer, v);
  std::memcpy(p, buffer, size_t(count) * sizeof(T));
}

// Pairwise, in a fixed order: halves, quarters and so on are added to each other.
template <class Acc, int Bytes>
RANDLORA_INLINE Acc sum(Vec<Acc, Bytes> v) {
  if constexpr (Bytes == 2 * sizeof(Acc)) {
    return v[0] + v[1];
  } else {
    Vec<Acc, Bytes / 2> halves[2];
    std::memcpy(&halves, &v, sizeof(v));
    return sum<Acc, Bytes / 2>(halves[0] + halves[1]);
  }
}

// ---- transposing ----

// Lane l of the result is lane l of the first vector where bit `Half` of l is 0 (with Second: 1), and lane l ^ Half of
// the other vector elsewhere.
template <int Half, bool Second, class V, int... Lane>
RANDLORA_INLINE V exchange(V first, V second, std::integer_sequence<int, Lane...>) {
  constexpr int L = sizeof...(Lane);
  return __builtin_shufflevector(first, second,
                                 (Lane & Half ? L + (Second ? Lane : Lane ^ Half) : (Second ? Lane ^ Half : Lane))...);
}

template <int Half, class V, int L>
RANDLORA_INLINE void exchange_halves(V (&rows)[L]) {
  for (int row = 0; row < L; ++row) {
    if (row & Half) continue;
    const V first = rows[row], second = rows[row + Half];
    rows[row] = exchange<Half, false>(first, second, std::make_integer_sequence<int, L>{});
    rows[row + Half] = exchange<Half, true>(first, second, std::make_integer_sequence<int, L>{});
  }
  if constexpr (Half > 1) exchange_halves<Half / 2>(rows);
}

// to = the transpose of from, both [kLanes, kLanes], contiguous and apart. In blocks of 16 bytes' width, whose shuffles
// every instruction set has: wider ones make more code than speed.
template <class Acc>
RANDLORA_INLINE void transpose(Acc* to, const Acc* from) {
  constexpr int L = kLanes<Acc>, N = 16 / int(sizeof(Acc));
  typedef Acc Narrow __attribute__((vector_size(16)));
  for (int y = 0; y < L; y += N)
    for (int x = 0; x < L; x += N) {
      Narrow rows[N];
      for (int row = 0; row < N; ++row) rows[row] = load_bits<Narrow>(from + (y + row) * L + x);
      exchange_halves<N / 2>(rows);
      for (int row = 0; row < N; ++row) store_bits(to + (x + row) * L + y, rows[row]);
    }
}

}  // namespace randlora::cpu
