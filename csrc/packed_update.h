// The same as sparse_update.h for ternary bases of medium density (z = 3): A as sorted lists of its rows, B at two bits
// per element. pattern is then (a_starts [r + 1], a_entries, b_planes), int32 but the last:
//
//   a_entries[a_starts[k] .. a_starts[k + 1])   2 j + (A[k, j] < 0), ascending j
//   b_planes [>= n r, 2, words]                 int16; bit o % 16 of word o / 16: B2[o, p] is +1 (plane 0), -1 (plane
//   1)
//
// The pattern of row k of A is the same for all n bases, so what belongs to it is a dense product over n and nz(k):
// 1/z of the dense product's work. Results have all m rows. CPU only: CUDA keeps such bases dense, for its tensor
// cores.
//
// randlora::packed_expand(Tensor[] pattern, int n, int min_dim, int max_dim, ScalarType dtype) -> (Tensor, Tensor)
//   A [r, 1, m] and the transpose of B2, [n r, M], for products that want them dense.
#pragma once

#include <cstdint>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace randlora {

struct PackedPattern {
  const int32_t *a_starts, *a_entries;
  const int16_t* b_planes;
  int64_t words;       // of a plane
  int64_t r, n, m, M;  // of this layer
};

inline bool is_packed(at::TensorList pattern) { return pattern.size() == 3; }

// Checks types, sizes, devices (ValueError, TypeError).
PackedPattern check_packed(at::TensorList pattern, int64_t r, int64_t n, int64_t m, int64_t M, const at::Tensor& like);

namespace cpu {

// D into `out`, [m, M] with one stride 1, or weight + D; lambda and gamma contiguous, fp64 where out is, else fp32.
void build_packed(const at::Tensor& out, const std::optional<at::Tensor>& weight, const PackedPattern& s,
                  const at::Tensor& lambda, const at::Tensor& gamma, double scale);

// dlambda [r, n] and dgamma [n, m] in grad's dtype; grad [m, M] contiguous, lambda and gamma as it.
std::tuple<at::Tensor, at::Tensor> gather_packed(const at::Tensor& grad, const PackedPattern& s,
                                                 const at::Tensor& lambda, const at::Tensor& gamma, double scale);

}  // namespace cpu
}  // namespace randlora
