#include "packed_update.h"

#include <algorithm>

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include "contents.h"
#include "dtypes.h"
#include "ops.h"
#include "parameter_gradients.h"
#include "sizes.h"

namespace randlora {
namespace {

// int16 [>= rows, planes, >= length / 16]
void check_planes(const at::Tensor& t, const char* name, int64_t rows, int64_t planes, int64_t length) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kShort, name, " must be int16, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == 3 && t.size(0) >= rows && t.size(1) == planes && t.size(2) >= divide_up(length, 16),
                    name, " must have shape [>= ", rows, ", ", planes, ", >= ", divide_up(length, 16), "], got ",
                    t.sizes());
}

// function(A [rows, 1, m], B2t [rows n, M], first, rows) for one group of rows k after the other.
template <class Function>
void for_groups(at::TensorList pattern, const LayerSizes& s, at::ScalarType dtype, const Function& function) {
  const int64_t group = unpacked_rows(s.r, s.n, s.M, dtype, pattern[0].device());
  for (int64_t first = 0; first < s.r; first += group) {
    const int64_t rows = std::min(group, s.r - first);
    const auto [A, B2t] = packed_expand(pattern, s.n, s.m, s.M, dtype, first, rows);
    function(A, B2t, first, rows);
  }
}

}  // namespace

void check_packed_lists(const at::Tensor& starts, const at::Tensor& entries) {
  for (const at::Tensor& t : {starts, entries}) {
    TORCH_CHECK_TYPE(t.scalar_type() == at::kInt, "a_starts and a_entries must be int32, got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.layout() == at::kStrided && t.dim() == 1 && t.is_contiguous(),
                      "a_starts and a_entries must be contiguous vectors, got shape ", t.sizes());
  }
  largest_of_lists(starts, entries, "a_entries");  // columns that the layer does not have are left out
}

PackedPattern check_packed(at::TensorList pattern, const LayerSizes& layer, const at::Tensor& like) {
  TORCH_CHECK_VALUE(is_packed(pattern),
                    "pattern must be a_starts, a_entries and b_planes, or a_planes and b_planes, got ", pattern.size(),
                    " tensors");
  check_size("r", layer.r);
  check_size("n", layer.n);
  check_size("m", layer.m);
  check_size("max_dim", layer.M);
  for (const at::Tensor& t : pattern)
    TORCH_CHECK_VALUE(t.layout() == at::kStrided && t.is_contiguous() && t.device() == like.device(),
                      "pattern must be contiguous on ", like.device(), ", got shape ", t.sizes(), " on ", t.device());
  PackedPattern s{layer};
  if (is_bits(pattern)) {
    const at::Tensor& a = BitTensors(pattern).a_planes;
    s.planes = a.dim() == 3 && a.size(1) == 1 ? 1 : 2;
    check_planes(a, "a_planes", s.r, s.planes, s.m);
    TORCH_CHECK_VALUE(a.size(0) == s.r, "a_planes must have r = ", s.r, " rows, got ", a.size(0));
    s.a_planes = a.const_data_ptr<int16_t>();
    s.a_words = a.size(2);
  } else {
    const PlaneTensors planes(pattern);
    check_packed_lists(planes.a_starts, planes.a_entries);
    TORCH_CHECK_VALUE(planes.a_starts.numel() == s.r + 1, "a_starts must have shape [r + 1] = [", s.r + 1, "], got ",
                      planes.a_starts.sizes());
    TORCH_CHECK_VALUE(s.m <= int64_t{1} << 30, "entries reach to 2^30 columns, got m = ", s.m);
    s.a_starts = planes.a_starts.const_data_ptr<int32_t>();
    s.a_entries = planes.a_entries.const_data_ptr<int32_t>();
  }
  const at::Tensor& b = is_bits(pattern) ? BitTensors(pattern).b_planes : PlaneTensors(pattern).b_planes;
  check_planes(b, "b_planes", s.n * s.r, s.planes, s.M);
  s.b_planes = b.const_data_ptr<int16_t>();
  s.words = b.size(2);
  return s;
}

Expansion make_expansion(at::TensorList pattern, int64_t n, int64_t m, int64_t M, at::ScalarType dtype, int64_t first,
                         std::optional<int64_t> rows) {
  TORCH_CHECK_VALUE(is_packed(pattern) && pattern[0].dim() >= 1,
                    "pattern must be 2 or 3 tensors, the first with r or r + 1 rows, got ", pattern.size());
  check_float(dtype, "dtype");
  const int64_t r = is_bits(pattern) ? pattern[0].size(0) : pattern[0].size(0) - 1;
  Expansion e{check_packed(pattern, {r, n, m, M}, pattern[0]), std::clamp<int64_t>(first, 0, r), 0, {}, {}};
  e.rows = rows.value_or(r - e.first);
  TORCH_CHECK_VALUE(e.first == first && e.rows >= 1 && e.rows <= r - first, "rows must lie in [0, r) = [0, ", r,
                    "), got ", e.rows, " from ", first, " on");
  e.A = at::empty({e.rows, 1, m}, pattern[0].options().dtype(dtype));
  e.B2t = at::empty({e.rows * n, M}, e.A.options());
  return e;
}

at::Tensor unpacked_update(at::TensorList pattern, const at::Tensor& lambda, const at::Tensor& gamma, int64_t M,
                           double scale, const std::optional<at::Tensor>& weight, at::ScalarType dtype) {
  const SkipAutogradAndAutocast guard;
  const LayerSizes s = check_parameters(lambda, gamma, M);
  check_packed(pattern, s, gamma);
  const at::Tensor out = empty_update(s, s.m, weight, gamma, dtype);
  const at::ScalarType acc = sum_type(dtype);
  const at::Tensor sum = dtype == acc ? out : at::empty(out.sizes(), out.options().dtype(acc));
  if (weight.has_value())
    sum.copy_(*weight);
  else
    sum.zero_();
  for_groups(pattern, s, acc, [&](const at::Tensor& A, const at::Tensor& B2t, int64_t first, int64_t rows) {
    const at::Tensor S2 = unique_base(A, lambda.narrow(0, first, rows), gamma, scale, acc).view({rows * s.n, s.m});
    sum.addmm_(S2.t(), B2t);
  });
  return dtype == acc ? out : out.copy_(sum);
}

std::tuple<at::Tensor, at::Tensor> unpacked_update_backward(const at::Tensor& grad, at::TensorList pattern,
                                                            const at::Tensor& lambda, const at::Tensor& gamma,
                                                            double scale, bool need_lambda, bool need_gamma) {
  const SkipAutogradAndAutocast guard;
  TORCH_CHECK_VALUE(grad.dim() == 2, "grad must have shape [m, M], got ", grad.sizes());
  const LayerSizes s = check_parameters(lambda, gamma, grad.size(1));
  check_packed(pattern, s, gamma);
  check_update_gradient(grad, s, s.m, gamma);
  const at::ScalarType acc = grad.scalar_type();
  const at::Tensor l = lambda.to(acc), g = gamma.to(acc);
  const at::Tensor dlambda = at::empty({need_lambda ? s.r : 0, s.n}, grad.options());
  at::Tensor dgamma;
  for_groups(pattern, s, acc, [&](const at::Tensor& A, const at::Tensor& B2t, int64_t first, int64_t rows) {
    const at::Tensor dS2 = B2t.mm(grad.t()).view({rows, s.n, s.m});
    const auto [dl, dg] = unique_base_backward(dS2, A, l.narrow(0, first, rows), g, scale, need_lambda, need_gamma);
    if (need_lambda) dlambda.narrow(0, first, rows).copy_(dl);
    if (need_gamma) dgamma = dgamma.defined() ? dgamma.add_(dg) : dg;
  });
  return parameter_gradients(dlambda, dgamma, lambda, gamma, need_lambda, need_gamma);
}

}  // namespace randlora
