// The same as sparse_update.h for ternary bases that are not very sparse: two or one bits per element of B, and of A
// either lists or bits as well. What is kept of each element is planes of bits, [..., planes, words] int16: bit e % 16
// of word e / 16 says of element e that it is +1 (plane 0) or -1 (the last plane). Where nothing is zero (sign bases)
// one plane does: what is not -1 is +1. pattern is one of
//
//   planes  (a_starts, a_entries, b_planes), medium density (z = 3), for the CPU: row k of A is a sorted list.
//           The pattern of row k is the same for all n bases, so what belongs to it is a dense product over n and
//           nz(k): 1/z of the dense product's work.
//   bits    (a_planes, b_planes): where dense products are faster all the same, which is for z below 2.5 and, with
//           tensor cores, below 10. Both bases are made dense for every call, a group of rows k of A at a time.
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

namespace randlora {

struct PackedPattern {
  const int32_t *a_starts, *a_entries;  // null for bits
  const int16_t* a_planes;              // null for planes
  const int16_t* b_planes;
  int64_t planes;          // of an element: 2 or 1
  int64_t a_words, words;  // of a plane of a_planes, of b_planes
  int64_t r, n, m, M;      // of this layer
};

inline bool is_bits(at::TensorList pattern) { return pattern.size() == 2; }
inline bool is_packed(at::TensorList pattern) { return pattern.size() == 3 || is_bits(pattern); }

// Whether products with these bases take them dense, on `device` by any strategy but "factored".
inline bool is_unpacked(at::TensorList pattern, at::Device device) {
  return is_bits(pattern) || (is_packed(pattern) && device.is_cuda());
}

// Checks what is not bits: types and, once per pattern, contents (ValueError, TypeError).
void check_packed_lists(const at::Tensor& a_starts, const at::Tensor& a_entries);

// Checks types, sizes, devices and, once per pattern, contents (ValueError, TypeError).
PackedPattern check_packed(at::TensorList pattern, int64_t r, int64_t n, int64_t m, int64_t M, const at::Tensor& like);

// What packed_expand was asked for; checks it.
struct Expansion {
  PackedPattern s;
  int64_t first, rows;
  at::Tensor A, B2t;  // not filled yet
};
Expansion make_expansion(at::TensorList pattern, int64_t n, int64_t m, int64_t M, at::ScalarType dtype, int64_t first,
                         std::optional<int64_t> rows);

// Rows k of A that are made dense at a time unless told otherwise: some 4 MiB of B on the CPU, so that bases which are
// packed to save memory do not take it in temporaries. All of them on CUDA, for few large products, and in 16 bits,
// where each further group would round the sum once more.
inline int64_t unpacked_rows(int64_t r, int64_t n, int64_t M, at::ScalarType dtype, at::Device device) {
  const int64_t element = int64_t(c10::elementSize(dtype));
  if (element < 4 || !device.is_cpu()) return r;
  return std::clamp<int64_t>((int64_t{4} << 20) / (n * M * element), 1, r);
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
