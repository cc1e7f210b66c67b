// The only place that knows in which order the arguments of `linear` and `linear_backward` come (schemas in ops.cpp):
// kernels get them by name, and callers give them so.
#pragma once

#include "layer/arguments.h"

namespace randlora {

inline LayerArguments by_name(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                              const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& A,
                              const std::optional<at::Tensor>& B, const at::Tensor& lambda, const at::Tensor& gamma,
                              at::TensorList pattern, const std::optional<at::Tensor>& seed, int64_t out_features,
                              double scale, at::ScalarType dtype, std::string_view strategy, double dropout,
                              bool weight_is_transposed, int64_t workspace, std::string_view backward_strategy) {
  LayerArguments a;
  a.x = x;
  a.weight = weight;
  a.bias = bias;
  a.A = A;
  a.B = B;
  a.lambda = lambda;
  a.gamma = gamma;
  a.pattern = pattern;
  a.seed = seed;
  a.out_features = out_features;
  a.scale = scale;
  a.dtype = dtype;
  a.strategy = strategy;
  a.backward_strategy = backward_strategy;
  a.dropout = dropout;
  a.weight_is_transposed = weight_is_transposed;
  a.workspace = workspace;
  return a;
}

// A kernel of `linear` that calls function(arguments).
template <at::Tensor (*function)(const LayerArguments&)>
at::Tensor linear_kernel(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& A,
                         const std::optional<at::Tensor>& B, const at::Tensor& lambda, const at::Tensor& gamma,
                         at::TensorList pattern, const std::optional<at::Tensor>& seed, int64_t out_features,
                         double scale, at::ScalarType dtype, c10::string_view strategy, double dropout,
                         bool weight_is_transposed, int64_t workspace,
                         std::optional<c10::string_view> backward_strategy) {
  return function(by_name(x, weight, bias, A, B, lambda, gamma, pattern, seed, out_features, scale, dtype, strategy,
                          dropout, weight_is_transposed, workspace, backward_strategy.value_or(strategy)));
}

// A kernel of `linear_backward` that calls function(grad, arguments, needed).
template <LayerGradients (*function)(const at::Tensor&, const LayerArguments&, const Needed&)>
LayerGradients linear_backward_kernel(const at::Tensor& grad, const at::Tensor& x,
                                      const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& A,
                                      const std::optional<at::Tensor>& B, const at::Tensor& lambda,
                                      const at::Tensor& gamma, at::TensorList pattern,
                                      const std::optional<at::Tensor>& seed, double scale, at::ScalarType dtype,
                                      c10::string_view strategy, double dropout, bool weight_is_transposed,
                                      int64_t workspace, bool need_x, bool need_lambda, bool need_gamma) {
  const int64_t out_features = grad.dim() > 0 ? grad.size(-1) : 0;
  return function(grad,
                  by_name(x, weight, std::nullopt, A, B, lambda, gamma, pattern, seed, out_features, scale, dtype,
                          strategy, dropout, weight_is_transposed, workspace, strategy),
                  {need_x, need_lambda, need_gamma});
}

// The ops, through the dispatcher.
at::Tensor call_linear(const LayerArguments& a);
// By the strategy a.backward_strategy.
LayerGradients call_linear_backward(const at::Tensor& grad, const LayerArguments& a, const Needed& needed);

}  // namespace randlora
