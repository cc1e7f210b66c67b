// Products of tokens with the update of very sparse ternary bases, through h as in the factored strategy, touching only
// what is non-zero. With m = min(in, out), M = max(in, out), D [m, M] as in sparse_update.h, and
//
//   C [n r, m], C[k n + i, j] = scale lambda[k,i] A[k,j] gamma[i,j]        D = C^T B2^T
//
// randlora::sparse_up_(Tensor(a!) out, Tensor x, Tensor[] pattern, Tensor randlora_lambda, Tensor randlora_gamma,
//                      float scale) -> ()
//     out [T, M] += x D, for x [T, m]                h = x C^T       out += h B2^T
// randlora::sparse_down_, the same: out [T, m] += x D^T, for x [T, M]:    h = x B2    out += h C
// randlora::sparse_gradients(Tensor narrow, Tensor wide, Tensor(a!)? into_narrow, Tensor[] pattern,
//                            Tensor randlora_lambda, Tensor randlora_gamma, float scale) -> (Tensor, Tensor)
//     dlambda [r, n] and dgamma [n, m] in fp32 (fp64 for fp64), from x and dy: narrow [T, m] and wide [T, M]. They
//     follow from t = h^T narrow where C is not zero, with h = wide B2. As h serves both, into_narrow [T, m] += wide
//     D^T on the way, if it is given.
//
// The narrow side of a layer is x where in <= out and y otherwise. Tokens are contiguous and have one dtype. A product
// with B2 takes T n r M / z additions, one with C T n r m / z multiply-adds: at M = m both are 1 / z of what T tokens
// cost the frozen layer. Sums have one order, whatever the number of threads. These ops are for the CPU only: on a GPU,
// dense products with D are faster (planner.py), and lists are not made there.
#pragma once

#include <ATen/core/Tensor.h>

#include "sparse_update.h"

namespace randlora {

// Checks lists, parameters and tokens (ValueError, TypeError).
SparsePattern check_sparse_tokens(const at::Tensor& narrow, const at::Tensor& wide, at::TensorList pattern,
                                  const at::Tensor& lambda, const at::Tensor& gamma);

}  // namespace randlora
