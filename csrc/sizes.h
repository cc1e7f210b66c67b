// What several ops need to know about sizes.
#pragma once

#include <cstdint>
#include <limits>

#include <c10/util/Exception.h>

namespace randlora {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A dimension. Products of two of them and a few bytes stay inside 64 bits.
inline void check_size(const char* name, int64_t size) {
  TORCH_CHECK_VALUE(size >= 1 && size <= std::numeric_limits<int32_t>::max(), name,
                    " must be at least 1 and at most 2^31 - 1, got ", size);
}

}  // namespace randlora
