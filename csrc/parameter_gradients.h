// How ops return the gradients of lambda and gamma.
#pragma once

#include <tuple>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace randlora {

// Each in its parameter's dtype, an empty tensor for one that is not needed.
inline std::tuple<at::Tensor, at::Tensor> parameter_gradients(const at::Tensor& dlambda, const at::Tensor& dgamma,
                                                              const at::Tensor& lambda, const at::Tensor& gamma,
                                                              bool need_lambda, bool need_gamma) {
  const auto one = [](const at::Tensor& gradient, const at::Tensor& parameter, bool needed) {
    return needed ? gradient.to(parameter.scalar_type()) : at::empty({0}, parameter.options());
  };
  return {one(dlambda, lambda, need_lambda), one(dgamma, gamma, need_gamma)};
}

}  // namespace randlora
