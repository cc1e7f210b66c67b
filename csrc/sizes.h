// What several ops share: checks, and the float types that tensors may have.
#pragma once

#include <cstdint>
#include <limits>

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

namespace randlora {

// The dtypes of x, weights, parameters and results.
inline bool is_float(at::ScalarType t) {
  return t == at::kFloat || t == at::kDouble || t == at::kBFloat16 || t == at::kHalf;
}

// function(T{}) with the C++ type of one of them.
template <class Function>
void with_float_type(at::ScalarType type, const Function& function) {
  switch (type) {
    case at::kDouble: return function(double{});
    case at::kFloat: return function(float{});
    case at::kBFloat16: return function(c10::BFloat16{});
    default: return function(c10::Half{});
  }
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A dimension. Products of two of them and a few bytes stay inside 64 bits.
inline void check_size(const char* name, int64_t size) {
  TORCH_CHECK_VALUE(size >= 1 && size <= std::numeric_limits<int32_t>::max(), name,
                    " must be at least 1 and at most 2^31 - 1, got ", size);
}

}  // namespace randlora
