// The forms in which bases are stored and multiplied where they are not dense tensors. A pattern is a list of tensors,
// and their number says which form it has:
//
//   lists   5   very sparse bases (sparse_update.h)
//   planes  3   ternary bases of medium density, for the CPU (packed_update.h)
//   bits    2   ternary bases that are made dense for every call (packed_update.h)
//   signs   4   Hadamard bases (hadamard.h)
//   seed    1   dense bases that nobody keeps: they are made for every call (seed.h)
//
// Without a tensor in it, a layer has dense bases A and B. patterns.py gives forms and tensors the same names.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace randlora {

inline bool is_lists(at::TensorList pattern) { return pattern.size() == 5; }
inline bool is_planes(at::TensorList pattern) { return pattern.size() == 3; }
inline bool is_bits(at::TensorList pattern) { return pattern.size() == 2; }
inline bool is_signs(at::TensorList pattern) { return pattern.size() == 4; }
inline bool is_seed(at::TensorList pattern) { return pattern.size() == 1; }

// Planes or bits: one or two bits per element of B.
inline bool is_packed(at::TensorList pattern) { return is_planes(pattern) || is_bits(pattern); }

// The tensors of each form by name. They refer to the pattern, which must have that form.

struct ListTensors {
  const at::Tensor &columns, &a_starts, &a_entries, &b_starts, &b_indices;

  explicit ListTensors(at::TensorList pattern)
      : columns(pattern[0]), a_starts(pattern[1]), a_entries(pattern[2]), b_starts(pattern[3]), b_indices(pattern[4]) {}
};

struct PlaneTensors {
  const at::Tensor &a_starts, &a_entries, &b_planes;

  explicit PlaneTensors(at::TensorList pattern) : a_starts(pattern[0]), a_entries(pattern[1]), b_planes(pattern[2]) {}
};

struct BitTensors {
  const at::Tensor &a_planes, &b_planes;

  explicit BitTensors(at::TensorList pattern) : a_planes(pattern[0]), b_planes(pattern[1]) {}
};

struct SignTensors {
  const at::Tensor &a, &b, &c, &width;

  explicit SignTensors(at::TensorList pattern) : a(pattern[0]), b(pattern[1]), c(pattern[2]), width(pattern[3]) {}
};

struct SeedTensors {
  const at::Tensor& seed;

  explicit SeedTensors(at::TensorList pattern) : seed(pattern[0]) {}
};

}  // namespace randlora
