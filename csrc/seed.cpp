#include "seed.h"

#include <c10/util/Exception.h>

#include "pattern.h"

namespace randlora {

void check_seed(at::TensorList pattern, at::Device device) {
  TORCH_CHECK_VALUE(is_seed(pattern), "pattern must be 1 seed, got ", pattern.size(), " tensors");
  const at::Tensor& t = SeedTensors(pattern).seed;
  TORCH_CHECK_VALUE(t.layout() == at::kStrided && t.dim() == 3 && t.size(0) >> 32 == 0 && t.size(1) == 0 &&
                        t.size(2) >> 32 == 0 && t.device() == device,
                    "the pattern's seed must have shape [upper 32 bits, 0, lower 32 bits] on ", device, ", got ",
                    t.sizes(), " on ", t.device());
}

int64_t seed_of(at::TensorList pattern) {
  const at::Tensor& t = SeedTensors(pattern).seed;
  return int64_t(uint64_t(t.size(0)) << 32 | uint64_t(t.size(2)));
}

}  // namespace randlora
