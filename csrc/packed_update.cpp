#include "packed_update.h"

#include <c10/util/Exception.h>

namespace randlora {

PackedPattern check_packed(at::TensorList pattern, int64_t r, int64_t n, int64_t m, int64_t M, const at::Tensor& like) {
  TORCH_CHECK_VALUE(is_packed(pattern), "pattern must be a_starts, a_entries and b_planes, got ", pattern.size(),
                    " tensors");
  const at::Tensor &starts = pattern[0], &entries = pattern[1], &planes = pattern[2];
  TORCH_CHECK_TYPE(
      starts.scalar_type() == at::kInt && entries.scalar_type() == at::kInt && planes.scalar_type() == at::kShort,
      "pattern must be int32, int32 and int16, got ", starts.scalar_type(), ", ", entries.scalar_type(), " and ",
      planes.scalar_type());
  for (const at::Tensor& t : pattern)
    TORCH_CHECK_VALUE(t.is_contiguous() && t.device() == like.device(), "pattern must be contiguous on ", like.device(),
                      ", got shape ", t.sizes(), " on ", t.device());
  TORCH_CHECK_VALUE(starts.dim() == 1 && starts.numel() == r + 1 && entries.dim() == 1,
                    "a_starts must have shape [r + 1] = [", r + 1, "], got ", starts.sizes());
  TORCH_CHECK_VALUE(
      M >= 1 && planes.dim() == 3 && planes.size(0) >= n * r && planes.size(1) == 2 && planes.size(2) >= (M + 15) / 16,
      "b_planes must have shape [>= n r, 2, >= M / 16] = [>= ", n * r, ", 2, >= ", (M + 15) / 16, "], got ",
      planes.sizes());
  PackedPattern s{};
  s.a_starts = starts.const_data_ptr<int32_t>();
  s.a_entries = entries.const_data_ptr<int32_t>();
  s.b_planes = planes.const_data_ptr<int16_t>();
  s.words = planes.size(2);
  s.r = r;
  s.n = n;
  s.m = m;
  s.M = M;
  return s;
}

}  // namespace randlora
