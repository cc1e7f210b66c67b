// Bits of packed bases (packed_update.h) to numbers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/vec.h"

namespace randlora::cpu {

// The 16 elements of a word as -1, 0, +1. In two halves of 8: compilers break comparisons of vectors that are wider
// than the registers into single elements.
template <class Acc>
RANDLORA_INLINE void unpack16(Acc* to, uint32_t plus, uint32_t minus) {
  typedef int32_t Ints __attribute__((vector_size(32)));
  typedef float Floats __attribute__((vector_size(32)));
  for (int half = 0; half < 2; ++half, plus >>= 8, minus >>= 8, to += 8) {
    const Ints bit = {1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7}, zero = {};
    const Ints p = zero + int32_t(plus), q = zero + int32_t(minus);
    const Ints value = ((q & bit) != 0) - ((p & bit) != 0);  // comparisons give -1 where they hold
    if constexpr (std::is_same_v<Acc, float>) {
      store_bits(to, __builtin_convertvector(value, Floats));
    } else {
      for (int l = 0; l < 8; ++l) to[l] = Acc(value[l]);
    }
  }
}

}  // namespace randlora::cpu
