#include "sparse_update.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/util/Exception.h>

#include "contents.h"
#include "sizes.h"

namespace randlora {

SparsePattern all_rows(const at::Tensor& lambda, const at::Tensor& gamma, int64_t M) {
  TORCH_CHECK_VALUE(lambda.dim() == 2 && lambda.numel() > 0, "randlora_lambda must have shape [r, n], got ",
                    lambda.sizes());
  TORCH_CHECK_VALUE(gamma.dim() == 2 && gamma.size(0) == lambda.size(1) && gamma.numel() > 0,
                    "randlora_gamma must have shape [n, m] with n = ", lambda.size(1), ", got ", gamma.sizes());
  TORCH_CHECK_TYPE(is_float(lambda.scalar_type()) && is_float(gamma.scalar_type()),
                   "parameters must be float64, float32, bfloat16 or float16, got ", lambda.scalar_type(), " and ",
                   gamma.scalar_type());
  TORCH_CHECK_VALUE(lambda.device() == gamma.device(), "parameters must be on one device, got ", lambda.device(),
                    " and ", gamma.device());
  check_size("r", lambda.size(0));
  check_size("n", lambda.size(1));
  check_size("m", gamma.size(1));
  check_size("max_dim", M);
  SparsePattern s{};
  s.r = lambda.size(0);
  s.n = lambda.size(1);
  s.count = s.m = gamma.size(1);
  s.M = M;
  return s;
}

ListsExtent check_lists(at::TensorList pattern, at::Device device) {
  TORCH_CHECK_VALUE(pattern.size() == 5, "pattern must be columns, a_starts, a_entries, b_starts and b_indices, got ",
                    pattern.size(), " tensors");
  TORCH_CHECK_VALUE(!device.is_cuda(), "lists are for the CPU; RandomBases.pattern gives bits for ", device);
  for (size_t i = 0; i < pattern.size(); ++i) {
    const at::Tensor& t = pattern[i];
    TORCH_CHECK_TYPE(t.scalar_type() == at::kInt || (i == 4 && t.scalar_type() == at::kShort),
                     "pattern must be int32 (b_indices: or int16), got ", t.scalar_type(), " at ", i);
    TORCH_CHECK_VALUE(t.layout() == at::kStrided && t.dim() == 1 && t.is_contiguous() && t.device() == device,
                      "pattern must be contiguous vectors on ", device, ", got shape ", t.sizes(), " on ", t.device(),
                      " at ", i);
  }
  TORCH_CHECK_VALUE(pattern[1].numel() == pattern[0].numel() + 1, "a_starts must have ", pattern[0].numel() + 1,
                    " elements, got ", pattern[1].numel());
  largest_of_lists(pattern[3], pattern[4], "b_indices");  // rows that the layer does not have are left out
  return {largest_of_lists({}, pattern[0], "columns") + 1,
          (largest_of_lists(pattern[1], pattern[2], "a_entries") >> 1) + 1};
}

SparsePattern check_pattern(at::TensorList pattern, const at::Tensor& lambda, const at::Tensor& gamma, int64_t M) {
  SparsePattern s = all_rows(lambda, gamma, M);
  const ListsExtent extent = check_lists(pattern, gamma.device());
  TORCH_CHECK_VALUE(extent.columns <= s.m, "these bases have a column ", extent.columns - 1,
                    ", so m must be larger, got randlora_gamma ", gamma.sizes());
  TORCH_CHECK_VALUE(extent.rows <= s.r, "these bases have a row ", extent.rows - 1,
                    ", so r must be larger, got randlora_lambda ", lambda.sizes());
  TORCH_CHECK_VALUE(pattern[3].numel() >= 2 * s.n * s.r + 1, "b_starts must have at least ", 2 * s.n * s.r + 1,
                    " elements, got ", pattern[3].numel());
  s.count = pattern[0].numel();
  s.columns = pattern[0].const_data_ptr<int32_t>();
  s.a_starts = pattern[1].const_data_ptr<int32_t>();
  s.a_entries = pattern[2].const_data_ptr<int32_t>();
  s.b_starts = pattern[3].const_data_ptr<int32_t>();
  s.b_indices = pattern[4].const_data_ptr();
  s.short_indices = pattern[4].scalar_type() == at::kShort;
  TORCH_CHECK_VALUE(!s.short_indices || M <= 65536, "int16 indices reach to 65536 rows, got max_dim = ", M);
  return s;
}

at::Tensor make_sparse_result(const SparsePattern& s, const std::optional<at::Tensor>& weight, const at::Tensor& gamma,
                              at::ScalarType dtype) {
  if (!weight.has_value()) {
    TORCH_CHECK_TYPE(is_float(dtype), "dtype must be float64, float32, bfloat16 or float16, got ", dtype);
    return at::empty({s.count, s.M}, gamma.options().dtype(dtype));
  }
  const at::Tensor& w = *weight;
  TORCH_CHECK_TYPE(w.scalar_type() == dtype && is_float(dtype), "weight must have dtype ", dtype, ", got ",
                   w.scalar_type());
  TORCH_CHECK_VALUE(w.dim() == 2 && w.size(0) == s.m && w.size(1) == s.M && w.device() == gamma.device(),
                    "weight must have shape [m, M] = [", s.m, ", ", s.M, "] on ", gamma.device(), ", got ", w.sizes(),
                    " on ", w.device());
  TORCH_CHECK_VALUE(w.stride(0) == 1 || w.stride(1) == 1, "weight must be contiguous along an axis, got strides ",
                    w.strides());
  if (w.stride(1) == 1) return at::empty({s.m, s.M}, w.options());
  return at::empty_strided({s.m, s.M}, {1, s.m}, w.options());
}

void check_sparse_grad(const SparsePattern& s, const at::Tensor& grad, const at::Tensor& gamma) {
  TORCH_CHECK_TYPE(grad.scalar_type() == at::kFloat || grad.scalar_type() == at::kDouble,
                   "grad must be float32 or float64, got ", grad.scalar_type());
  TORCH_CHECK_VALUE(
      grad.dim() == 2 && grad.size(0) == s.count && grad.size(1) == s.M && grad.device() == gamma.device(),
      "grad must have shape [columns, M] = [", s.count, ", ", s.M, "] on ", gamma.device(), ", got ", grad.sizes(),
      " on ", grad.device());
}

}  // namespace randlora
