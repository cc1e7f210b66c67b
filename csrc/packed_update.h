// Updates of ternary bases that are less sparse than those of sparse_update.h, by the same ops. B is kept in bits, and
// A in lists or in bits as well. Two bits say what an element is. They lie in planes, [..., planes, words] int16: bit
// e % 16 of word e / 16 is set in plane 0 where element e is +1, and in the last plane where it is -1. Bases without
// zeros (sign bases) have one plane: what is not -1 is +1. A pattern (pattern.h) has one of two forms:
//
//   planes  (a_starts, a_entries, b_planes), for medium density (z = 3) on the CPU: row k of A is a sorted list. All n
//           bases share row k, so its part of the update is a dense product over the n bases and the non-zeros of the
//           row: 1/z of the dense product's work.
//   bits    (a_planes, b_planes), where dense products are faster all the same: for z below 2.5, and with tensor cores
//           below 10. Both bases are made dense for every call, a group of rows k of A at a time.
//
//   a_starts [r + 1], a_entries   int32; [a_starts[k] .. a_starts[k + 1]) of row k: 2 j + (A[k, j] < 0), ascending j
//   a_planes [r, planes, words]   of the columns j of A
//   b_planes [>= n r, 2 or planes, words]   of the rows o of B2, for every column p
//
// Results have all m rows.
//
// randlora::packed_expand(Tensor[] pattern, int n, int min_dim, int max_dim, ScalarType dtype, int first=0,
//                         int? rows=None) -> (Tensor, Tensor)
//   Rows k of A in [first, first + rows) (default: all behind), [rows, 1, m], and what they are multiplied with, the
//   columns [first n, (first + rows) n) of B2, transposed: [rows n, M].
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include <ATen/core/Tensor.h>

#include "pattern.h"
#include "update.h"

namespace randlora {

// Planes or bits as kernels read them, for one layer.
struct PackedPattern : LayerSizes {
  const int32_t *a_starts = nullptr, *a_entries = nullptr;  // of planes
  const int16_t* a_planes = nullptr;                        // of bits
  const int16_t* b_planes = nullptr;
  int64_t planes = 2;              // of an element: 2 or 1
  int64_t a_words = 0, words = 0;  // of a plane of a_planes, of b_planes
};

// Checks the lists of planes: types and, once per pattern, contents (ValueError, TypeError).
void check_packed_lists(const at::Tensor& a_starts, const at::Tensor& a_entries);

// Checks types, sizes, devices and, once per pattern, contents (ValueError, TypeError).
PackedPattern check_packed(at::TensorList pattern, const LayerSizes& layer, const at::Tensor& like);

// What packed_expand was asked for; checks it.
struct Expansion {
  PackedPattern s;
  int64_t first, rows;
  at::Tensor A, B2t;  // not filled yet
};
Expansion make_expansion(at::TensorList pattern, int64_t n, int64_t m, int64_t M, at::ScalarType dtype, int64_t first,
                         std::optional<int64_t> rows);

// How many bytes of B the CPU makes dense at a time, so that bases which are packed to save memory do not take it in
// temporaries. randlora's cost model reads this number from the Python module (python.cpp).
constexpr int64_t kUnpackedBytes = int64_t{4} << 20;

// The rows k of A that are made dense at a time where the caller sets no limit of its own. All of them on CUDA, for few
// large products, and in 16 bits, where each further group would round the sum once more.
inline int64_t unpacked_rows(int64_t r, int64_t n, int64_t M, at::ScalarType dtype, at::Device device) {
  const int64_t element = int64_t(c10::elementSize(dtype));
  if (element < 4 || !device.is_cpu()) return r;
  return std::clamp<int64_t>(kUnpackedBytes / (n * M * element), 1, r);
}

// sparse_update and sparse_update_backward through dense products, on any device, summed as wide as the result at
// least in fp32.
at::Tensor unpacked_update(at::TensorList pattern, const at::Tensor& lambda, const at::Tensor& gamma, int64_t M,
                           double scale, const std::optional<at::Tensor>& weight, at::ScalarType dtype);
std::tuple<at::Tensor, at::Tensor> unpacked_update_backward(const at::Tensor& grad, at::TensorList pattern,
                                                            const at::Tensor& lambda, const at::Tensor& gamma,
                                                            double scale, bool need_lambda, bool need_gamma);

namespace cpu {

// D into `out`, [m, M] with one stride 1, or weight + D; lambda and gamma contiguous, fp64 where out is, else fp32.
void build_packed(const at::Tensor& out, const std::optional<at::Tensor>& weight, const PackedPattern& s,
                  const at::Tensor& lambda, const at::Tensor& gamma, double scale);

// dlambda [r, n] and dgamma [n, m] in grad's dtype; grad [m, M] contiguous, lambda and gamma as it.
std::tuple<at::Tensor, at::Tensor> gather_packed(const at::Tensor& grad, const PackedPattern& s,
                                                 const at::Tensor& lambda, const at::Tensor& gamma, double scale);

}  // namespace cpu
}  // namespace randlora
