// The layer op under autograd: a node in C++, as one in Python costs the host more than all kernels of a small layer.
// What it keeps is the input as it came, references to the weight, the bases and the parameters, and the seed of the
// dropout mask. Its backward is the op linear_backward, below autograd; for those who want a graph of it, too, that op
// has a backward of its own (randlora/ops/linear.py).
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/sum.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "layer/schema.h"

namespace randlora {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor below_autograd(const LayerArguments& a) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_linear(a);
}

std::optional<at::Tensor> optional(const at::Tensor& t) { return t.defined() ? std::optional(t) : std::nullopt; }

// apply() gets the tensors that have gradients one by one besides all arguments: autograd sees tensors only where they
// are arguments themselves.
struct RandLoraLinear : torch::autograd::Function<RandLoraLinear> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& /*x*/, const at::Tensor& /*lambda*/,
                            const at::Tensor& /*gamma*/, const std::optional<at::Tensor>& /*bias*/,
                            const LayerArguments& a) {
    keep(ctx, a);
    return below_autograd(a);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const at::Tensor& grad = grads[0];
    // Below autograd the tangent would be lost without a word. What is called in forward mode has another node.
    TORCH_CHECK_NOT_IMPLEMENTED(!(grad.defined() && grad._fw_grad(0).defined()),
                                "randlora: the backward of a layer can be differentiated in forward mode only where "
                                "its forward was called inside of torch.autograd.forward_ad.dual_level(), too");
    const variable_list saved = ctx->get_saved_variables();
    const Needed needed{ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2)};
    variable_list found(5);  // of x, lambda, gamma, bias; none of all arguments
    if (needed.x || needed.parameters()) {
      // Whoever wants a graph gets the op with its own derivative, which is slower.
      std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
      if (!c10::GradMode::is_enabled()) guard.emplace();
      auto [dx, dlambda, dgamma] = call_linear_backward(grad, kept(ctx, saved), needed);
      if (needed.x) found[0] = std::move(dx);
      if (needed.lambda) found[1] = std::move(dlambda);
      if (needed.gamma) found[2] = std::move(dgamma);
    }
    const auto bias = ctx->saved_data.find("bias_dtype");
    if (bias != ctx->saved_data.end() && ctx->needs_input_grad(3)) {
      const auto dtype = at::ScalarType(bias->second.toInt());
      std::vector<int64_t> leading(grad.dim() - 1);
      for (size_t axis = 0; axis < leading.size(); ++axis) leading[axis] = int64_t(axis);
      found[3] = leading.empty() ? grad.to(dtype) : at::sum(grad, leading, false, dtype);
    }
    return found;
  }

 private:
  // What a backward needs.
  static void keep(AutogradContext* ctx, const LayerArguments& a) {
    const at::Tensor none;
    variable_list saved{a.x, a.lambda, a.gamma, a.weight.value_or(none), a.A.value_or(none), a.B.value_or(none)};
    saved.insert(saved.end(), a.pattern.begin(), a.pattern.end());
    ctx->save_for_backward(std::move(saved));
    auto& data = ctx->saved_data;
    data["scale"] = a.scale;
    data["dtype"] = int64_t(a.dtype);
    data["strategy"] = std::string(a.backward_strategy);
    data["dropout"] = a.dropout;
    data["transposed"] = a.weight_is_transposed;
    data["workspace"] = a.workspace;
    if (a.bias.has_value()) data["bias_dtype"] = int64_t(a.bias->scalar_type());
    if (a.seed.has_value()) data["seed"] = *a.seed;  // a number, which no hook need take away
  }

  // It again. The result refers to `saved` and to what `ctx` keeps.
  static LayerArguments kept(AutogradContext* ctx, const variable_list& saved) {
    const auto& data = ctx->saved_data;
    LayerArguments a;
    a.x = saved[0];
    a.lambda = saved[1];
    a.gamma = saved[2];
    a.weight = optional(saved[3]);
    a.A = optional(saved[4]);
    a.B = optional(saved[5]);
    a.pattern = at::TensorList(saved).slice(6);
    a.scale = data.at("scale").toDouble();
    a.dtype = at::ScalarType(data.at("dtype").toInt());
    a.backward_strategy = data.at("strategy").toStringView();
    a.dropout = data.at("dropout").toDouble();
    a.weight_is_transposed = data.at("transposed").toBool();
    a.workspace = data.at("workspace").toInt();
    if (const auto seed = data.find("seed"); seed != data.end()) a.seed = seed->second.toTensor();
    return a;
  }
};

at::Tensor linear(const LayerArguments& a) {
  const auto moves = [](const at::Tensor& t) {
    return t.defined() && t._fw_grad(0).defined();
  };
  const bool weight = a.weight.has_value(), bias = a.bias.has_value();
  TORCH_CHECK_NOT_IMPLEMENTED(
      !(moves(a.x) || moves(a.lambda) || moves(a.gamma) || (weight && moves(*a.weight)) || (bias && moves(*a.bias))),
      "torch.ops.randlora.linear has no rule for forward-mode AD: call "
      "randlora.functional.linear, outside of torch.compile");
  const bool graph =
      c10::GradMode::is_enabled() && (a.x.requires_grad() || a.lambda.requires_grad() || a.gamma.requires_grad() ||
                                      (weight && a.weight->requires_grad()) || (bias && a.bias->requires_grad()));
  if (!graph) return below_autograd(a);
  TORCH_CHECK_VALUE(!(weight && a.weight->requires_grad()),
                    "the base weight is trainable: only the ordinary path can compute its gradient");
  return RandLoraLinear::apply(a.x, a.lambda, a.gamma, a.bias, a);
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, Autograd, m) { m.impl("linear", &linear_kernel<linear>); }

}  // namespace randlora
