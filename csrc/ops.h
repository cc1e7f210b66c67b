// The ops as C++ functions that go through the dispatcher, so that code for any device can call them.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace randlora {

at::Tensor unique_base(const at::Tensor& A, const at::Tensor& lambda, const at::Tensor& gamma, double scale,
                       std::optional<at::ScalarType> dtype);

std::tuple<at::Tensor, at::Tensor> unique_base_backward(const at::Tensor& grad, const at::Tensor& A,
                                                        const at::Tensor& lambda, const at::Tensor& gamma, double scale,
                                                        bool need_lambda, bool need_gamma);

at::Tensor sparse_update(at::TensorList pattern, const at::Tensor& lambda, const at::Tensor& gamma, int64_t max_dim,
                         double scale, const std::optional<at::Tensor>& weight, at::ScalarType dtype);

std::tuple<at::Tensor, at::Tensor> sparse_update_backward(const at::Tensor& grad, at::TensorList pattern,
                                                          const at::Tensor& lambda, const at::Tensor& gamma,
                                                          double scale, bool need_lambda, bool need_gamma);

std::tuple<at::Tensor, at::Tensor> packed_expand(at::TensorList pattern, int64_t n, int64_t min_dim, int64_t max_dim,
                                                 at::ScalarType dtype);

at::Tensor dropout(const at::Tensor& x, const at::Tensor& seed, double p);

}  // namespace randlora
