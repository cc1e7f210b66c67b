// Checks that several ops share.
#pragma once

#include <cstdint>
#include <limits>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace randlora {

// The dtypes of x, weights, parameters and results.
inline bool is_float(at::ScalarType t) {
  return t == at::kFloat || t == at::kDouble || t == at::kBFloat16 || t == at::kHalf;
}

// A dimension. Products of two of them and a few bytes stay inside 64 bits.
inline void check_size(const char* name, int64_t size) {
  TORCH_CHECK_VALUE(size >= 1 && size <= std::numeric_limits<int32_t>::max(), name,
                    " must be at least 1 and at most 2^31 - 1, got ", size);
}

}  // namespace randlora
