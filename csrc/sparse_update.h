// randlora::sparse_update(Tensor[] pattern, Tensor randlora_lambda, Tensor randlora_gamma, int max_dim, float scale,
//                         Tensor? weight, ScalarType dtype) -> Tensor
// randlora::sparse_update_backward(Tensor grad, Tensor[] pattern, Tensor randlora_lambda, Tensor randlora_gamma,
//                                  float scale, bool need_lambda, bool need_gamma) -> (Tensor, Tensor)
//
// The update of very sparse ternary bases, built from what is non-zero. With m = min(in, out), M = max(in, out):
//
//   D[j, o] = scale * sum_{k: A[k,j] != 0} A[k,j] * sum_i lambda[k,i] gamma[i,j] B2[o, k*n + i]      [m, M]
//
// dW is D^T where in <= out and D otherwise. Row j of D is zero where column j of A is. Without `weight`, sparse_update
// returns the other rows alone, [columns, M], in `dtype`; with it, weight + D, [m, M], in the weight's dtype and layout
// (one of its strides is 1). The backward takes the gradient of these rows, [columns, M], fp32 or fp64, and returns
//
//   t[k,i,j] = scale * A[k,j] * sum_o B2[o, k*n + i] grad[j, o]
//   dlambda[k,i] = sum_j t[k,i,j] gamma[i,j]        dgamma[i,j] = sum_k t[k,i,j] lambda[k,i]
//
// Both take nnz(A) * n * M / z = r n m M / z^2 additions, where z is the sparsity. The dense product takes r n m M
// multiply-adds: at M = m = 2048, z = sqrt(m), two thousand times as many. Sums have one order, whatever the number of
// threads.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

#include "update.h"

namespace randlora {

// Lists as kernels read them, for one layer. A layer smaller than the store uses leading parts of them.
struct SparsePattern : LayerSizes {
  const int32_t* columns = nullptr;    // [columns] the j < m with a non-zero in A, ascending
  const int32_t* a_starts = nullptr;   // [columns + 1] where the entries of each begin
  const int32_t* a_entries = nullptr;  // [a_starts[columns]] 2 k + (A[k, j] < 0), ascending k
  const int32_t* b_starts = nullptr;   // [2 n r + 1] of column p of B2: +1 at [2p, 2p + 1), -1 at [2p + 1, 2p + 2)
  const void* b_indices = nullptr;     // rows o of B2, ascending in each list; int16 (read as unsigned) or int32
  bool short_indices = false;          // int16
  int64_t count = 0;                   // of columns
};

// The smallest m and r of a layer that these lists fit.
struct ListsExtent {
  int64_t columns, rows;
};

// Checks types, devices and, once per pattern, contents (ValueError, TypeError).
ListsExtent check_lists(at::TensorList pattern, at::Device device);

// Checks the lists and the parameters of a layer, and that they fit each other.
SparsePattern check_lists_of_layer(at::TensorList pattern, const at::Tensor& lambda, const at::Tensor& gamma,
                                   int64_t M);

}  // namespace randlora
