// Bits of packed bases (packed_update.h) to numbers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/vec.h"

namespace randlora::cpu {

// The 16 elements of a word as -1, 0, +1.
template <class Acc>
RANDLORA_INLINE void unpack16(Acc* to, uint32_t plus, uint32_t minus) {
  const I32x16 bit = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                      1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  const I32x16 zero = {};
  const I32x16 p = zero + int32_t(plus), q = zero + int32_t(minus);
  const I32x16 value = ((q & bit) != 0) - ((p & bit) != 0);  // comparisons give -1 where they hold
  if constexpr (std::is_same_v<Acc, float>) {
    store(to, __builtin_convertvector(value, F32x16));
  } else {
    for (int l = 0; l < 16; ++l) to[l] = Acc(value[l]);
  }
}

}  // namespace randlora::cpu
