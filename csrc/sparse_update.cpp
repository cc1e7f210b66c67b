#include "sparse_update.h"

#include <c10/util/Exception.h>

#include "contents.h"
#include "pattern.h"
#include "sparse_products.h"

namespace randlora {

ListsExtent check_lists(at::TensorList pattern, at::Device device) {
  TORCH_CHECK_VALUE(is_lists(pattern), "pattern must be columns, a_starts, a_entries, b_starts and b_indices, got ",
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
  const ListTensors lists(pattern);
  TORCH_CHECK_VALUE(lists.a_starts.numel() == lists.columns.numel() + 1, "a_starts must have ",
                    lists.columns.numel() + 1, " elements, got ", lists.a_starts.numel());
  largest_of_lists(lists.b_starts, lists.b_indices, "b_indices");  // rows that the layer does not have are left out
  return {largest_of_lists({}, lists.columns, "columns") + 1,
          (largest_of_lists(lists.a_starts, lists.a_entries, "a_entries") >> 1) + 1};
}

SparsePattern check_lists_of_layer(at::TensorList pattern, const at::Tensor& lambda, const at::Tensor& gamma,
                                   int64_t M) {
  SparsePattern s{check_parameters(lambda, gamma, M)};
  const ListsExtent extent = check_lists(pattern, gamma.device());
  const ListTensors lists(pattern);
  TORCH_CHECK_VALUE(extent.columns <= s.m, "these bases have a column ", extent.columns - 1,
                    ", so m must be larger, got randlora_gamma ", gamma.sizes());
  TORCH_CHECK_VALUE(extent.rows <= s.r, "these bases have a row ", extent.rows - 1,
                    ", so r must be larger, got randlora_lambda ", lambda.sizes());
  TORCH_CHECK_VALUE(lists.b_starts.numel() >= 2 * s.n * s.r + 1, "b_starts must have at least ", 2 * s.n * s.r + 1,
                    " elements, got ", lists.b_starts.numel());
  s.count = lists.columns.numel();
  s.columns = lists.columns.const_data_ptr<int32_t>();
  s.a_starts = lists.a_starts.const_data_ptr<int32_t>();
  s.a_entries = lists.a_entries.const_data_ptr<int32_t>();
  s.b_starts = lists.b_starts.const_data_ptr<int32_t>();
  s.b_indices = lists.b_indices.const_data_ptr();
  s.short_indices = lists.b_indices.scalar_type() == at::kShort;
  TORCH_CHECK_VALUE(!s.short_indices || M <= 65536, "int16 indices reach to 65536 rows, got max_dim = ", M);
  return s;
}

SparsePattern check_sparse_tokens(const at::Tensor& narrow, const at::Tensor& wide, at::TensorList pattern,
                                  const at::Tensor& lambda, const at::Tensor& gamma) {
  const SparsePattern s = check_lists_of_layer(pattern, lambda, gamma, features_of(wide));
  check_tokens(narrow, wide, s, gamma.device());
  return s;
}

}  // namespace randlora
