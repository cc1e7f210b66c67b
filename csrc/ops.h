// The ops as C++ functions that go through the dispatcher, so that code for any device can call them.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace randlora {

// As long as it lives, ops that are called go past autocast and autograd: our kernels choose the precision of their
// products, and have gradients of their own. Nor is a result that was reshaped recorded as a view: what an op returns
// is an ordinary tensor, which in-place operations may touch.
struct SkipAutogradAndAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset |
                                           c10::autograd_dispatch_keyset_with_ADInplaceOrView};
};

void fill_bases_(const at::Tensor& out, int64_t seed, int64_t stream, at::IntArrayRef offsets,
                 std::optional<double> sparsity);

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

void sparse_up_(const at::Tensor& out, const at::Tensor& x, at::TensorList pattern, const at::Tensor& lambda,
                const at::Tensor& gamma, double scale);

void sparse_down_(const at::Tensor& out, const at::Tensor& x, at::TensorList pattern, const at::Tensor& lambda,
                  const at::Tensor& gamma, double scale);

std::tuple<at::Tensor, at::Tensor> sparse_gradients(const at::Tensor& narrow, const at::Tensor& wide,
                                                    const std::optional<at::Tensor>& into_narrow,
                                                    at::TensorList pattern, const at::Tensor& lambda,
                                                    const at::Tensor& gamma, double scale);

std::tuple<at::Tensor, at::Tensor> packed_expand(at::TensorList pattern, int64_t n, int64_t min_dim, int64_t max_dim,
                                                 at::ScalarType dtype, int64_t first, std::optional<int64_t> rows);

void hadamard_up_(const at::Tensor& out, const at::Tensor& x, at::TensorList pattern, const at::Tensor& lambda,
                  const at::Tensor& gamma, double scale);

void hadamard_down_(const at::Tensor& out, const at::Tensor& x, at::TensorList pattern, const at::Tensor& lambda,
                    const at::Tensor& gamma, double scale);

std::tuple<at::Tensor, at::Tensor> hadamard_gradients(const at::Tensor& narrow, const at::Tensor& wide,
                                                      const std::optional<at::Tensor>& into_narrow,
                                                      const std::optional<at::Tensor>& into_wide,
                                                      at::TensorList pattern, const at::Tensor& lambda,
                                                      const at::Tensor& gamma, double scale);

at::Tensor hadamard_update(at::TensorList pattern, const at::Tensor& lambda, const at::Tensor& gamma, int64_t max_dim,
                           double scale, const std::optional<at::Tensor>& weight, at::ScalarType dtype);

std::tuple<at::Tensor, at::Tensor> hadamard_update_backward(const at::Tensor& grad, at::TensorList pattern,
                                                            const at::Tensor& lambda, const at::Tensor& gamma,
                                                            double scale, bool need_lambda, bool need_gamma);

at::Tensor dropout(const at::Tensor& x, const at::Tensor& seed, double p);

}  // namespace randlora
