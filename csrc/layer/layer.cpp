#include "layer/layer.h"

#include <algorithm>
#include <optional>
#include <vector>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "ops.h"
#include "parameter_gradients.h"
#include "pattern.h"

namespace randlora {
namespace {

// Whether ATen's products of this 16-bit type go through oneDNN, which they do where the CPU has what it takes.
bool multiplies(const char* query) {
  const auto op = c10::Dispatcher::singleton().findSchema({query, ""});
  return op.has_value() && op->typed<bool()>().call();
}

// The dtype to compute in: fp32 for 16 bits on CPUs without products for them, where PyTorch's own loops take ten to a
// hundred times as long as casting and an fp32 product do.
at::ScalarType product_dtype(const at::Tensor& x, at::ScalarType dtype) {
  if (!x.is_cpu() || c10::elementSize(dtype) > 2) return dtype;
  static const bool bf16 = multiplies("mkldnn::_is_mkldnn_bf16_supported"),
                    fp16 = multiplies("mkldnn::_is_mkldnn_fp16_supported");
  return (dtype == at::kBFloat16 ? bf16 : fp16) ? dtype : at::kFloat;
}

// Whether products with packed bases take them dense. Bits always do; planes have products of their own on the CPU,
// with dW alone.
bool unpacks(const LayerArguments& a, Strategy strategy) {
  return is_bits(a.pattern) || (is_planes(a.pattern) && (strategy == Strategy::factored || a.x.is_cuda()));
}

}  // namespace

at::Tensor cast(const at::Tensor& t, at::ScalarType dtype) { return t.scalar_type() == dtype ? t : t.to(dtype); }

at::Tensor cut(const at::Tensor& t, int64_t axis, int64_t begin, int64_t length) {
  return t.size(axis) == length ? t : t.narrow(axis, begin, length);
}

at::Tensor mm_accumulated(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() == at::kFloat || a.scalar_type() == at::kDouble) return at::mm(a, b);
  if (a.is_cuda()) return at::mm(a, b, at::kFloat);
  return at::mm(a.to(at::kFloat), b.to(at::kFloat));
}

std::unique_ptr<Layer> make_layer(const LayerArguments& a) {
  const Strategy strategy = parse_strategy(a.strategy, tokens_of(a.x));
  if (is_signs(a.pattern)) return make_hadamard_layer(a, strategy);
  if (a.pattern.empty() || is_seed(a.pattern) || unpacks(a, strategy)) return make_dense_layer(a, strategy);
  return make_ternary_layer(a, strategy);
}

Layer::Layer(const LayerArguments& a, Strategy strategy)
    : a_(a),
      strategy_(strategy),
      dtype_(product_dtype(a.x, a.dtype)),
      in_(a.x.size(-1)),
      out_(a.out_features),
      tokens_(tokens_of(a.x)),
      sizes_{a.lambda.size(0), a.lambda.size(1), std::min(in_, out_), std::max(in_, out_)},
      wide_(in_ <= out_),
      x_(tokens(cast(a.x, dtype_), in_)) {
  if (!a.weight.has_value()) return;
  const at::Tensor w = cast(*a.weight, dtype_);
  weight_ = a.weight_is_transposed ? w.t() : w;
}

at::Tensor Layer::forward() const {
  const std::optional<at::Tensor> bias = a_.bias.has_value() ? std::optional(cast(*a_.bias, dtype_)) : std::nullopt;
  at::Tensor y;
  if (strategy_ == Strategy::merged) {
    y = at::linear(x_, matrix(weight_), bias);
  } else {
    if (weight_.defined()) y = at::linear(x_, weight_, bias);
    add_update(y, dropped(x_));
  }
  y = cast(y, a_.dtype);
  if (a_.x.dim() == 2) return y;
  std::vector<int64_t> shape = a_.x.sizes().vec();
  shape.back() = out_;
  return y.view(shape);
}

LayerGradients Layer::backward(const at::Tensor& grad, const Needed& needed) const {
  const at::Tensor g = tokens(cast(grad, dtype_), out_);
  at::Tensor dx, dx_of_update;  // apart only where a dropout mask lies between them
  if (needed.x && strategy_ == Strategy::merged)
    dx = g.mm(matrix(weight_));
  else if (needed.x && weight_.defined())
    dx = g.mm(weight_);
  const auto [dlambda, dgamma] =
      update_backward(a_.dropout > 0 ? dx_of_update : dx, g, needed.parameters() ? dropped(x_) : x_, needed);
  if (dx_of_update.defined()) dx = dx.defined() ? dx.add_(dropped(dx_of_update)) : dropped(dx_of_update);
  if (needed.x && a_.x.dim() != 2) dx = dx.view(a_.x.sizes());
  return {gradient_or_empty(dx, a_.x, needed.x), gradient_or_empty(dlambda, a_.lambda, needed.lambda),
          gradient_or_empty(dgamma, a_.gamma, needed.gamma)};
}

void Layer::accumulate(at::Tensor& y, const at::Tensor& a, const at::Tensor& b) {
  if (y.defined())
    y.addmm_(a, b);
  else
    y = at::mm(a, b);
}

const at::Tensor& Layer::zeros_unless_defined(at::Tensor& y, int64_t features, const at::Tensor& like) const {
  if (!y.defined()) y = at::zeros({tokens_, features}, like.options());
  return y;
}

at::Tensor Layer::update_gradient(const at::Tensor& g, const at::Tensor& x) const {
  return wide_ ? mm_accumulated(x.t(), g) : mm_accumulated(g.t(), x);
}

// [..., features] as [tokens, features].
at::Tensor Layer::tokens(const at::Tensor& t, int64_t features) const {
  return t.dim() == 2 ? t : t.reshape({tokens_, features});
}

at::Tensor Layer::dropped(const at::Tensor& t) const { return a_.dropout > 0 ? dropout(t, *a_.seed, a_.dropout) : t; }

}  // namespace randlora
