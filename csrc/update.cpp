#include "update.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/util/Exception.h>

#include "dtypes.h"
#include "sizes.h"

namespace randlora {

LayerSizes check_parameters(const at::Tensor& lambda, const at::Tensor& gamma, int64_t M) {
  TORCH_CHECK_VALUE(lambda.dim() == 2 && lambda.numel() > 0, "randlora_lambda must have shape [r, n], got ",
                    lambda.sizes());
  TORCH_CHECK_VALUE(gamma.dim() == 2 && gamma.size(0) == lambda.size(1) && gamma.numel() > 0,
                    "randlora_gamma must have shape [n, m] with n = ", lambda.size(1), ", got ", gamma.sizes());
  check_float(lambda, "randlora_lambda");
  check_float(gamma, "randlora_gamma");
  TORCH_CHECK_VALUE(lambda.device() == gamma.device(), "parameters must be on one device, got ", lambda.device(),
                    " and ", gamma.device());
  const LayerSizes layer{lambda.size(0), lambda.size(1), gamma.size(1), M};
  check_size("r", layer.r);
  check_size("n", layer.n);
  check_size("m", layer.m);
  check_size("max_dim", layer.M);
  return layer;
}

int64_t features_of(const at::Tensor& tokens) {
  TORCH_CHECK_VALUE(tokens.dim() == 2, "tokens must have shape [T, m] or [T, M], got ", tokens.sizes());
  return tokens.size(1);
}

void check_tokens_like(const at::Tensor& t, const char* name, const at::Tensor& like, int64_t features) {
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, " must have dtype ", like.scalar_type(), ", got ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(0) == like.size(0) && t.size(1) == features && t.device() == like.device() &&
                        t.is_contiguous(),
                    name, " must be contiguous with shape [", like.size(0), ", ", features, "] on ", like.device(),
                    ", got ", t.sizes(), " with strides ", t.strides(), " on ", t.device());
}

void check_tokens(const at::Tensor& narrow, const at::Tensor& wide, const LayerSizes& layer, at::Device device) {
  TORCH_CHECK_VALUE(narrow.dim() == 2, "tokens must have shape [T, m] or [T, M], got ", narrow.sizes());
  check_float(narrow, "tokens");
  TORCH_CHECK_VALUE(narrow.device() == device, "tokens must be on ", device, ", got ", narrow.device());
  check_tokens_like(narrow, "the tokens of the narrow side", narrow, layer.m);
  check_tokens_like(wide, "the tokens of the wide side", narrow, layer.M);
}

at::Tensor empty_update(const LayerSizes& layer, int64_t rows, const std::optional<at::Tensor>& weight,
                        const at::Tensor& gamma, at::ScalarType dtype) {
  if (!weight.has_value()) {
    check_float(dtype, "dtype");
    return at::empty({rows, layer.M}, gamma.options().dtype(dtype));
  }
  const at::Tensor& w = *weight;
  TORCH_CHECK_TYPE(w.scalar_type() == dtype && is_float(dtype), "weight must have dtype ", dtype, ", got ",
                   w.scalar_type());
  TORCH_CHECK_VALUE(w.dim() == 2 && w.size(0) == layer.m && w.size(1) == layer.M && w.device() == gamma.device(),
                    "weight must have shape [m, M] = [", layer.m, ", ", layer.M, "] on ", gamma.device(), ", got ",
                    w.sizes(), " on ", w.device());
  TORCH_CHECK_VALUE(w.stride(0) == 1 || w.stride(1) == 1, "weight must be contiguous along an axis, got strides ",
                    w.strides());
  if (w.stride(1) == 1) return at::empty({layer.m, layer.M}, w.options());
  return at::empty_strided({layer.m, layer.M}, {1, layer.m}, w.options());
}

void check_update_gradient(const at::Tensor& grad, const LayerSizes& layer, int64_t rows, const at::Tensor& gamma) {
  TORCH_CHECK_TYPE(grad.scalar_type() == at::kFloat || grad.scalar_type() == at::kDouble,
                   "grad must be float32 or float64, got ", grad.scalar_type());
  TORCH_CHECK_VALUE(
      grad.dim() == 2 && grad.size(0) == rows && grad.size(1) == layer.M && grad.device() == gamma.device(),
      "grad must have shape [rows, M] = [", rows, ", ", layer.M, "] on ", gamma.device(), ", got ", grad.sizes(),
      " on ", grad.device());
}

}  // namespace randlora
