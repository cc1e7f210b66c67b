// randlora::unique_base(Tensor A, Tensor randlora_lambda, Tensor randlora_gamma, float scale=1.0,
//                       ScalarType? dtype=None) -> Tensor
// randlora::unique_base_backward(Tensor grad, Tensor A, Tensor randlora_lambda, Tensor randlora_gamma,
//                                float scale=1.0, bool need_lambda=True, bool need_gamma=True) -> (Tensor, Tensor)
//
//   S[k,i,j]     = scale * lambda[k,i] * A[k,0,j] * gamma[i,j]                        [r, n, m]
//   dlambda[k,i] = scale * sum_j grad[k,i,j] A[k,0,j] gamma[i,j]                      [r, n]
//   dgamma[i,j]  = scale * sum_k grad[k,i,j] A[k,0,j] lambda[k,i]                     [n, m]
//
// (UniqueBaseGrad of arXiv 2502.00987 and of PEFT.) Arithmetic and sums are fp32, or fp64 as soon as one tensor is;
// S is rounded once, to `dtype` (default: the promoted type of the inputs). A gradient that is not needed comes back
// as an empty tensor. The forward reads lambda, A, gamma and writes S once; the backward reads grad once.
#pragma once

#include <cstdint>
#include <optional>

#include <ATen/core/Tensor.h>

namespace randlora {

struct UniqueBaseShape {
  int64_t r, n, m;
};

// Checks ranks, sizes, dtypes and devices (ValueError, TypeError).
UniqueBaseShape check_unique_base(const at::Tensor& A, const at::Tensor& lambda, const at::Tensor& gamma);
void check_unique_base_grad(const at::Tensor& grad, const at::Tensor& A, UniqueBaseShape shape);

// The promoted type of the three, or `dtype`.
at::ScalarType unique_base_dtype(const at::Tensor& A, const at::Tensor& lambda, const at::Tensor& gamma,
                                 std::optional<at::ScalarType> dtype);

// fp64 if one of the tensors is or `result` is, fp32 otherwise.
at::ScalarType accumulate_type(const at::Tensor& A, const at::Tensor& lambda, const at::Tensor& gamma,
                               at::ScalarType result);

}  // namespace randlora
