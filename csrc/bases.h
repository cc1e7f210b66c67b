// randlora::fill_bases_(Tensor(a!) out, int seed, int stream, int[] offsets, float? sparsity=None) -> ()
//
// Writes the slice of a random base that starts at `offsets` = (x0, x1, x2) into `out` [X0, X1, X2]: stream 0 is A
// with (k, 0, j), stream 1 is B with (o, i, k). Without `sparsity` the values are dense (float64/32, bfloat16, half);
// with it they are -1, 0, +1 (those types, or int8) and the unit-variance factor sqrt(sparsity) is left to the caller.
// Streams 3, 4 and 5 are the signs a_j, b_o and c_q of Hadamard bases (hadamard.h): out [1, 1, X], -1 or +1 (int8 too).
#pragma once

#include <cstdint>
#include <optional>

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include "philox.h"

namespace randlora {

// A slice as kernels see it. Row (x0, x1) begins at out + x0 * stride0 + x1 * stride1.
struct BaseSlice {
  int64_t size0, size1, size2;
  int64_t stride0, stride1;  // in elements; the last axis has stride 1
  uint32_t start0, start1, start2;
  uint32_t key0, key1;
  Stream stream;

  bool is_signs() const { return stream >= Stream::hadamard_a; }
  // Philox counters that one row touches; the first and the last may be partial.
  RANDLORA_HD int64_t quads_per_row() const { return (start2 % 4 + size2 + 3) / 4; }
};

// Checks the arguments (ValueError, TypeError), marks `out` as written to and describes the slice.
BaseSlice make_base_slice(const at::Tensor& out, int64_t seed, int64_t stream, c10::IntArrayRef offsets,
                          std::optional<double> sparsity);

// t = floor(2^32 / (2 z)) for sparsity z: a random word below t means -1, one from 2^32 - t on means +1, others 0.
uint32_t ternary_threshold(double sparsity);

}  // namespace randlora
