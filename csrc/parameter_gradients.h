// How ops return gradients.
#pragma once

#include <tuple>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace randlora {

// In the dtype of the tensor that it belongs to; an empty tensor where it is not needed.
inline at::Tensor gradient_or_empty(const at::Tensor& gradient, const at::Tensor& of, bool needed) {
  if (!needed) return at::empty({0}, of.options());
  return gradient.scalar_type() == of.scalar_type() ? gradient : gradient.to(of.scalar_type());
}

// Of lambda and gamma.
inline std::tuple<at::Tensor, at::Tensor> parameter_gradients(const at::Tensor& dlambda, const at::Tensor& dgamma,
                                                              const at::Tensor& lambda, const at::Tensor& gamma,
                                                              bool need_lambda, bool need_gamma) {
  return {gradient_or_empty(dlambda, lambda, need_lambda), gradient_or_empty(dgamma, gamma, need_gamma)};
}

}  // namespace randlora
