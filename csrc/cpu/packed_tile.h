// The pieces of planes (packed_update.h) that the loops over A and B work on.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/unpack.h"
#include "packed_update.h"

namespace randlora::cpu {

// The entries of row k with j in [begin, end).
RANDLORA_INLINE const int32_t* first_entry(const PackedPattern& s, int64_t k, int64_t j) {
  return std::lower_bound(s.a_entries + s.a_starts[k], s.a_entries + s.a_starts[k + 1], int32_t(2 * j));
}

// Columns p = k n + i of B2, i < n, rows [o, o + width) to [n, kTile]; zeros behind row M. o and kTile: multiples
// of 16.
template <int64_t kTile, class Acc>
RANDLORA_INLINE void unpack_tile(Acc* to, const PackedPattern& s, int64_t k, int64_t o) {
  const int64_t words = std::min(kTile, s.M - o + 15) / 16;
  const uint32_t last = (s.M - o) % 16 && words * 16 > s.M - o ? (1u << ((s.M - o) % 16)) - 1 : 0xffffu;
  for (int64_t i = 0; i < s.n; ++i, to += kTile) {
    const uint16_t* const plus = reinterpret_cast<const uint16_t*>(s.b_planes) + (k * s.n + i) * 2 * s.words + o / 16;
    const uint16_t* const minus = plus + s.words;
    for (int64_t w = 0; w + 1 < words; ++w) unpack16(to + 16 * w, plus[w], minus[w]);
    unpack16(to + 16 * (words - 1), plus[words - 1] & last, minus[words - 1] & last);
    std::fill_n(to + 16 * words, kTile - 16 * words, Acc(0));
  }
}

}  // namespace randlora::cpu
