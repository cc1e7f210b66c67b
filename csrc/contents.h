// Checks of what index lists contain. Kernels use indices as addresses without checking them, so an op takes lists only
// after their contents were checked: once for each pair of tensors, and again as soon as one of them was written to.
//
// List l of (starts, values) is values[starts[l] .. starts[l + 1]).
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace randlora {

// Checks that `starts` (int32, at least one) never falls and stays inside `values` (int32, or int16 read as unsigned),
// and that each list ascends from 0 or more; returns the largest value of a list, -1 where there is none (ValueError).
// Both are contiguous vectors. An undefined `starts` means that all values are one list. Tensors that are not on the
// CPU are copied there for the check.
int64_t largest_of_lists(const at::Tensor& starts, const at::Tensor& values, const char* name);

}  // namespace randlora
