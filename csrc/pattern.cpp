#include "pattern.h"

#include <torch/library.h>

#include "hadamard.h"
#include "packed_update.h"
#include "seed.h"
#include "sparse_update.h"

namespace randlora {
namespace {

void check_pattern(at::TensorList pattern) {
  TORCH_CHECK_VALUE(is_lists(pattern) || is_packed(pattern) || is_signs(pattern) || is_seed(pattern),
                    "pattern must be 5 lists, 4 tensors of Hadamard bases, 3 or 2 of packed ones, or 1 seed, got ",
                    pattern.size(), " tensors");
  if (is_lists(pattern)) check_lists(pattern, pattern[0].device());
  if (is_planes(pattern)) check_packed_lists(PlaneTensors(pattern).a_starts, PlaneTensors(pattern).a_entries);
  if (is_signs(pattern)) check_signs(pattern, pattern[0].device());
  if (is_seed(pattern)) check_seed(pattern, pattern[0].device());
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, CompositeExplicitAutograd, m) { m.impl("check_pattern", &check_pattern); }
TORCH_LIBRARY_IMPL(randlora, Meta, m) {
  m.impl("check_pattern", [](at::TensorList) {});
}

}  // namespace randlora
