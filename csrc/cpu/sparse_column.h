// One column of B2 as index lists (sparse_update.h).
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/isa.h"
#include "sparse_update.h"

namespace randlora::cpu {

// The rows o < M at which column p of B2 is +1, and at which it is -1.
template <class Index>
struct Column {
  const Index *plus, *plus_end, *minus, *minus_end;

  RANDLORA_INLINE Column(const SparsePattern& s, int64_t p) {
    const Index* const all = static_cast<const Index*>(s.b_indices);
    plus = all + s.b_starts[2 * p];
    minus = all + s.b_starts[2 * p + 1];
    plus_end = cut(plus, minus, s.M);
    minus_end = cut(minus, all + s.b_starts[2 * p + 2], s.M);
  }

  // The store may have more rows than the layer.
  static RANDLORA_INLINE const Index* cut(const Index* from, const Index* to, int64_t M) {
    return to == from || int64_t(to[-1]) < M ? to : std::lower_bound(from, to, M);
  }
};

}  // namespace randlora::cpu
