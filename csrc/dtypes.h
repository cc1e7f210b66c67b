// The float types that tensors may have, and the type that sums of their numbers have.
#pragma once

#include <type_traits>

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

namespace randlora {

// The dtypes of x, weights, parameters and results.
inline bool is_float(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

// Throws TypeError unless it is one of them. `name` is the argument's.
inline void check_float(at::ScalarType type, const char* name) {
  TORCH_CHECK_TYPE(is_float(type), name, " must be float64, float32, bfloat16 or float16, got ", type);
}
inline void check_float(const at::Tensor& t, const char* name) { check_float(t.scalar_type(), name); }

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

// What numbers of type T are added up in: fp64 for fp64, fp32 for all others.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The same as a dtype.
inline at::ScalarType sum_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// function(Acc{}) with the C++ type of such a dtype.
template <class Function>
void with_sum_type(at::ScalarType type, const Function& function) {
  if (type == at::kDouble)
    function(double{});
  else
    function(float{});
}

}  // namespace randlora
