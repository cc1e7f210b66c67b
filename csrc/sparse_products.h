// Products of tokens with the update of very sparse ternary bases, through h as in the factored strategy, touching only
// what is non-zero. With m = min(in, out), M = max(in, out), D [m, M] as in sparse_update.h, and
//
//   C [n r, m], C[k n + i, j] = scale lambda[k,i] A[k,j] gamma[i,j]        D = C^T B2^T
//
//   sparse_up     large += small D                 h = small C^T     large += h B2^T
//   sparse_down   small += large D^T               h = large B2      small += h C
//                 and the parameters' gradients    t = h^T small where C is not zero
//
// small [T, m] and large [T, M] are the two sides of a layer: x and y where in <= out, y and x otherwise. A product
// with B2 takes T n r M / z additions, one with C T n r m / z multiply-adds: at M = m both are 1 / z of what T tokens
// cost the frozen layer. Sums have one order, whatever the number of threads. CPU only: on a GPU the dense products
// with D are faster (planner.py).
#pragma once

#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>

#include "sparse_update.h"

namespace randlora::cpu {

// large [T, M] contiguous, in the dtype of small [T, m].
void sparse_up(const at::Tensor& large, const at::Tensor& small, at::TensorList pattern, const at::Tensor& lambda,
               const at::Tensor& gamma, double scale);

// into [T, m], contiguous, in large's dtype: gets large D^T added.
void sparse_down(const at::Tensor& into, const at::Tensor& large, at::TensorList pattern, const at::Tensor& lambda,
                 const at::Tensor& gamma, double scale);

// dlambda [r, n] and dgamma [n, m], in fp32 (fp64 for fp64 tokens); with `into` also sparse_down, as h serves both.
std::tuple<at::Tensor, at::Tensor> sparse_gradients(const std::optional<at::Tensor>& into, const at::Tensor& large,
                                                    const at::Tensor& small, at::TensorList pattern,
                                                    const at::Tensor& lambda, const at::Tensor& gamma, double scale);

}  // namespace randlora::cpu
