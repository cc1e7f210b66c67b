// randlora::dropout(Tensor x, Tensor seed, float p) -> Tensor
//
// Element e (flat, C order) of x is dropped if word e % 4 of the Philox counter {e / 4 (64 bits), 0, 2} under the
// 64-bit key `seed` lies below p * 2^32; the others are divided by 1 - p. The mask can thus be drawn again instead of
// kept, and it is the same on every device. The gradient of x is the same op, applied to the gradient of the result.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "dtypes.h"
#include "philox.h"

namespace randlora {

struct DropoutMask {
  uint32_t threshold;  // words below it are dropped
  uint32_t key0, key1;

  RANDLORA_HD Philox4 words(uint64_t quad) const {
    return philox4x32_10(uint32_t(quad), uint32_t(quad >> 32), 0, uint32_t(Stream::dropout), key0, key1);
  }
};

inline void check_dropout(const at::Tensor& x, const at::Tensor& seed, double p) {
  check_float(x, "x");
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong, "seed must be int64, got ", seed.scalar_type());
  TORCH_CHECK_VALUE(seed.numel() == 1, "seed must have one element, got shape ", seed.sizes());
  TORCH_CHECK_VALUE(seed.device() == x.device(), "seed must be on the device of x, ", x.device(), ", got ",
                    seed.device());
  TORCH_CHECK_VALUE(p >= 0 && p < 1, "p must be at least 0 and below 1, got ", p);
}

inline uint32_t dropout_threshold(double p) { return uint32_t(p * 4294967296.0); }

}  // namespace randlora
