#include "hadamard.h"

#include <c10/util/Exception.h>

#include "pattern.h"
#include "sizes.h"

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

}  // namespace

void check_signs(at::TensorList pattern, at::Device device) {
  TORCH_CHECK_VALUE(is_signs(pattern), "pattern must be the sign words a, b and c, and width, got ", pattern.size(),
                    " tensors");
  for (size_t i = 0; i < 3; ++i) {
    const at::Tensor& t = pattern[i];
    TORCH_CHECK_TYPE(t.scalar_type() == at::kInt, "words of signs must be int32, got ", t.scalar_type(), " at ", i);
    TORCH_CHECK_VALUE(t.layout() == at::kStrided && t.dim() == 1 && t.is_contiguous() && t.device() == device,
                      "words of signs must be contiguous vectors on ", device, ", got shape ", t.sizes(), " on ",
                      t.device(), " at ", i);
  }
  const at::Tensor& width = SignTensors(pattern).width;
  TORCH_CHECK_TYPE(width.scalar_type() == at::kChar, "width must be int8, got ", width.scalar_type());
  const int64_t w = width.dim() == 2 ? width.size(0) : 0;
  TORCH_CHECK_VALUE((w == 1 || w == 2 || w == 4 || w == 8) && width.size(1) == 0 && width.device() == device,
                    "width must have shape [w, 0] with w = 1, 2, 4 or 8 on ", device, ", got ", width.sizes(), " on ",
                    width.device());
}

HadamardShape check_hadamard(at::TensorList pattern, const at::Tensor& lambda, const at::Tensor& gamma, int64_t M) {
  HadamardShape s{check_parameters(lambda, gamma, M)};
  check_signs(pattern, gamma.device());
  const SignTensors signs(pattern);
  TORCH_CHECK_VALUE(s.m <= s.M, "randlora_gamma must have at most max_dim = ", s.M, " columns, got ", gamma.sizes());
  s.P = s.n * s.r;
  check_size("n * r", s.P);
  check_words(signs.a, "a", s.m);
  check_words(signs.b, "b", s.M);
  check_words(signs.c, "c", s.P);
  s.R = power_of_two(s.r);
  s.width = signs.width.size(0);
  s.columns = s.width * divide_up(s.m, s.width * s.R);
  s.a = signs.a.const_data_ptr<int32_t>();
  s.b = signs.b.const_data_ptr<int32_t>();
  s.c = signs.c.const_data_ptr<int32_t>();
  return s;
}

HadamardShape check_hadamard_tokens(const at::Tensor& narrow, const at::Tensor& wide, at::TensorList pattern,
                                    const at::Tensor& lambda, const at::Tensor& gamma) {
  const HadamardShape s = check_hadamard(pattern, lambda, gamma, features_of(wide));
  check_tokens(narrow, wide, s, gamma.device());
  return s;
}

HadamardShape check_hadamard_gradients(const at::Tensor& narrow, const at::Tensor& wide,
                                       const std::optional<at::Tensor>& into_narrow,
                                       const std::optional<at::Tensor>& into_wide, at::TensorList pattern,
                                       const at::Tensor& lambda, const at::Tensor& gamma) {
  const HadamardShape s = check_hadamard_tokens(narrow, wide, pattern, lambda, gamma);
  TORCH_CHECK_VALUE(!into_narrow.has_value() || !into_wide.has_value(),
                    "at most one of into_narrow and into_wide may be given, got both");
  if (into_narrow.has_value()) check_tokens_like(*into_narrow, "into_narrow", narrow, s.m);
  if (into_wide.has_value()) check_tokens_like(*into_wide, "into_wide", narrow, s.M);
  return s;
}

at::Tensor make_hadamard_update(const HadamardShape& s, const std::optional<at::Tensor>& weight,
                                const at::Tensor& gamma, at::ScalarType dtype) {
  return empty_update(s, s.m, weight, gamma, dtype);
}

HadamardShape check_hadamard_grad(const at::Tensor& grad, at::TensorList pattern, const at::Tensor& lambda,
                                  const at::Tensor& gamma) {
  TORCH_CHECK_VALUE(grad.dim() == 2, "grad must have shape [m, M], got ", grad.sizes());
  const HadamardShape s = check_hadamard(pattern, lambda, gamma, grad.size(1));
  check_update_gradient(grad, s, s.m, gamma);
  return s;
}

}  // namespace randlora
