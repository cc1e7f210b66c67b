// Dense bases of which nothing is kept but their seed. Every element is a function of the seed and its own indices
// (bases.h), so a call makes the part of A and B that its layer needs, and frees it when it is done. A pattern
// (pattern.h) of one tensor says the seed in its shape, which the host can read without waiting for the device:
//
//   seed  [upper 32 bits, 0, lower 32 bits], any dtype; it has no elements
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace randlora {

// ValueError unless the pattern says a seed on this device.
void check_seed(at::TensorList pattern, at::Device device);

// The seed, as fill_bases_ takes it. The pattern must have been checked.
int64_t seed_of(at::TensorList pattern);

}  // namespace randlora
