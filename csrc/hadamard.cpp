#include "hadamard.h"

#include <algorithm>

#include <c10/util/Exception.h>

#include "sizes.h"
#include "sparse_update.h"

namespace randlora {
namespace {

int64_t power_of_two(int64_t at_least) {
  int64_t power = 1;
  while (power < at_least) power *= 2;
  return power;
}

void check_words(const at::Tensor& words, const char* name, int64_t signs) {
  TORCH_CHECK_VALUE(words.numel() >= divide_up(signs, 32), name, " must have at least ", divide_up(signs, 32),
                    " words of 32 signs for ", signs, " signs, got ", words.numel());
}

void check_like(const at::Tensor& t, const char* name, const at::Tensor& like, int64_t tokens, int64_t features) {
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, " must have dtype ", like.scalar_type(), ", got ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(
      t.dim() == 2 && t.size(0) == tokens && t.size(1) == features && t.device() == like.device() && t.is_contiguous(),
      name, " must be contiguous with shape [", tokens, ", ", features, "] on ", like.device(), ", got ", t.sizes(),
      " with strides ", t.strides(), " on ", t.device());
}

}  // namespace

void check_hadamard_pattern(at::TensorList pattern, at::Device device) {
  TORCH_CHECK_VALUE(is_hadamard(pattern), "pattern must be the sign words a, b and c, and width, got ", pattern.size(),
                    " tensors");
  for (size_t i = 0; i < 3; ++i) {
    const at::Tensor& t = pattern[i];
    TORCH_CHECK_TYPE(t.scalar_type() == at::kInt, "words of signs must be int32, got ", t.scalar_type(), " at ", i);
    TORCH_CHECK_VALUE(t.layout() == at::kStrided && t.dim() == 1 && t.is_contiguous() && t.device() == device,
                      "words of signs must be contiguous vectors on ", device, ", got shape ", t.sizes(), " on ",
                      t.device(), " at ", i);
  }
  const at::Tensor& width = pattern[3];
  TORCH_CHECK_TYPE(width.scalar_type() == at::kChar, "width must be int8, got ", width.scalar_type());
  const int64_t w = width.dim() == 2 ? width.size(0) : 0;
  TORCH_CHECK_VALUE((w == 1 || w == 2 || w == 4 || w == 8) && width.size(1) == 0 && width.device() == device,
                    "width must have shape [w, 0] with w = 1, 2, 4 or 8 on ", device, ", got ", width.sizes(), " on ",
                    width.device());
}

HadamardShape check_hadamard(at::TensorList pattern, const at::Tensor& lambda, const at::Tensor& gamma, int64_t M) {
  const SparsePattern layer = all_rows(lambda, gamma, M);
  check_hadamard_pattern(pattern, gamma.device());
  HadamardShape s{};
  s.r = layer.r;
  s.n = layer.n;
  s.m = layer.m;
  s.M = layer.M;
  TORCH_CHECK_VALUE(s.m <= s.M, "randlora_gamma must have at most max_dim = ", s.M, " columns, got ", gamma.sizes());
  s.P = s.n * s.r;
  check_size("n * r", s.P);
  check_words(pattern[0], "a", s.m);
  check_words(pattern[1], "b", s.M);
  check_words(pattern[2], "c", s.P);
  s.R = power_of_two(s.r);
  s.width = pattern[3].size(0);
  s.columns = s.width * divide_up(s.m, s.width * s.R);
  s.a = pattern[0].const_data_ptr<int32_t>();
  s.b = pattern[1].const_data_ptr<int32_t>();
  s.c = pattern[2].const_data_ptr<int32_t>();
  return s;
}

HadamardShape check_hadamard_tokens(const at::Tensor& narrow, const at::Tensor& wide, at::TensorList pattern,
                                    const at::Tensor& lambda, const at::Tensor& gamma) {
  TORCH_CHECK_VALUE(narrow.dim() == 2 && wide.dim() == 2, "tokens must have shapes [T, m] and [T, M], got ",
                    narrow.sizes(), " and ", wide.sizes());
  TORCH_CHECK_TYPE(is_float(narrow.scalar_type()), "tokens must be float64, float32, bfloat16 or float16, got ",
                   narrow.scalar_type());
  const HadamardShape s = check_hadamard(pattern, lambda, gamma, wide.size(1));
  TORCH_CHECK_VALUE(narrow.device() == gamma.device(), "tokens must be on ", gamma.device(), ", got ", narrow.device());
  check_like(narrow, "the tokens of the narrow side", narrow, narrow.size(0), s.m);
  check_like(wide, "the tokens of the wide side", narrow, narrow.size(0), s.M);
  return s;
}

HadamardShape check_hadamard_gradients(const at::Tensor& narrow, const at::Tensor& wide,
                                       const std::optional<at::Tensor>& into_narrow,
                                       const std::optional<at::Tensor>& into_wide, at::TensorList pattern,
                                       const at::Tensor& lambda, const at::Tensor& gamma) {
  const HadamardShape s = check_hadamard_tokens(narrow, wide, pattern, lambda, gamma);
  TORCH_CHECK_VALUE(!into_narrow.has_value() || !into_wide.has_value(),
                    "at most one of into_narrow and into_wide may be given, got both");
  if (into_narrow.has_value()) check_like(*into_narrow, "into_narrow", narrow, narrow.size(0), s.m);
  if (into_wide.has_value()) check_like(*into_wide, "into_wide", narrow, narrow.size(0), s.M);
  return s;
}

at::Tensor make_hadamard_update(const HadamardShape& s, const std::optional<at::Tensor>& weight,
                                const at::Tensor& gamma, at::ScalarType dtype) {
  SparsePattern rows{};
  rows.count = rows.m = s.m;
  rows.M = s.M;
  return make_sparse_result(rows, weight, gamma, dtype);
}

HadamardShape check_hadamard_grad(const at::Tensor& grad, at::TensorList pattern, const at::Tensor& lambda,
                                  const at::Tensor& gamma) {
  TORCH_CHECK_VALUE(grad.dim() == 2, "grad must have shape [m, M], got ", grad.sizes());
  const HadamardShape s = check_hadamard(pattern, lambda, gamma, grad.size(1));
  check_sparse_grad(all_rows(lambda, gamma, s.M), grad, gamma);
  return s;
}

}  // namespace randlora
