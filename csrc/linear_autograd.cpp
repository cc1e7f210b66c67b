// The layer op under autograd: a node in C++, as one in Python costs the host more than all kernels of a small layer.
// What it keeps is the input as it came, references to the weight, the bases and the parameters, and the seed of the
// dropout mask. Its backward is the op linear_backward, below autograd; for those who want a graph of it, too, that op
// has a backward of its own (randlora/ops/linear.py).
#include <tuple>
#include <utility>
#include <vector>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/sum.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "linear.h"

namespace randlora {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Linear = at::Tensor(const at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                          const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, const at::Tensor&,
                          const at::Tensor&, int64_t, double, at::ScalarType, c10::string_view, double,
                          const std::optional<at::Tensor>&, bool, int64_t, at::TensorList,
                          std::optional<c10::string_view>);
using LinearBackward = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
    const std::optional<at::Tensor>&, const at::Tensor&, const at::Tensor&, double, at::ScalarType, c10::string_view,
    double, const std::optional<at::Tensor>&, bool, int64_t, at::TensorList, bool, bool, bool);

// The arguments that no gradient is computed for: autograd sees tensors only where they are arguments themselves.
struct Fixed {
  const std::optional<at::Tensor>&weight, &A, &B;
  int64_t out_features;
  double scale;
  at::ScalarType dtype;
  c10::string_view strategy, backward_strategy;
  double dropout;
  const std::optional<at::Tensor>& seed;
  bool weight_is_transposed;
  int64_t workspace;
  at::TensorList pattern;
};

at::Tensor below_autograd(const at::Tensor& x, const at::Tensor& lambda, const at::Tensor& gamma,
                          const std::optional<at::Tensor>& bias, const Fixed& f) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("randlora::linear", "").typed<Linear>();
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, f.weight, bias, f.A, f.B, lambda, gamma, f.out_features, f.scale, f.dtype, f.strategy, f.dropout,
                 f.seed, f.weight_is_transposed, f.workspace, f.pattern, std::nullopt);
}

std::optional<at::Tensor> optional(const at::Tensor& t) { return t.defined() ? std::optional(t) : std::nullopt; }

struct RandLoraLinear : torch::autograd::Function<RandLoraLinear> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& lambda,
                            const at::Tensor& gamma, const std::optional<at::Tensor>& bias, const Fixed& f) {
    const at::Tensor none;
    variable_list saved{x, lambda, gamma, f.weight.value_or(none), f.A.value_or(none), f.B.value_or(none)};
    saved.insert(saved.end(), f.pattern.begin(), f.pattern.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["options"] = c10::ivalue::Tuple::create(
        f.scale, int64_t(f.dtype), std::string(f.backward_strategy), f.dropout, f.weight_is_transposed, f.workspace,
        int64_t(bias.has_value() ? bias->scalar_type() : at::ScalarType::Undefined));
    if (f.seed.has_value()) ctx->saved_data["seed"] = *f.seed;  // a number, which no hook need take away
    return below_autograd(x, lambda, gamma, bias, f);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("randlora::linear_backward", "").typed<LinearBackward>();
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<c10::IValue> options = ctx->saved_data["options"].toTupleRef().elements().vec();
    const auto kept_seed = ctx->saved_data.find("seed");
    const std::optional<at::Tensor> seed =
        kept_seed == ctx->saved_data.end() ? std::nullopt : std::optional(kept_seed->second.toTensor());
    const at::Tensor& grad = grads[0];
    const bool need_x = ctx->needs_input_grad(0), need_lambda = ctx->needs_input_grad(1),
               need_gamma = ctx->needs_input_grad(2);
    variable_list found(5);  // of x, lambda, gamma, bias, and none of the fixed
    if (need_x || need_lambda || need_gamma) {
      // Whoever wants a graph gets the op with its own derivative, which is slower.
      std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
      if (!c10::GradMode::is_enabled()) guard.emplace();
      auto [dx, dlambda, dgamma] =
          op.call(grad, saved[0], optional(saved[3]), optional(saved[4]), optional(saved[5]), saved[1], saved[2],
                  options[0].toDouble(), at::ScalarType(options[1].toInt()), options[2].toStringView(),
                  options[3].toDouble(), seed, options[4].toBool(), options[5].toInt(), at::TensorList(saved).slice(6),
                  need_x, need_lambda, need_gamma);
      if (need_x) found[0] = std::move(dx);
      if (need_lambda) found[1] = std::move(dlambda);
      if (need_gamma) found[2] = std::move(dgamma);
    }
    const auto bias_dtype = at::ScalarType(options[6].toInt());
    if (bias_dtype != at::ScalarType::Undefined && ctx->needs_input_grad(3)) {
      std::vector<int64_t> leading(grad.dim() - 1);
      for (size_t axis = 0; axis < leading.size(); ++axis) leading[axis] = int64_t(axis);
      found[3] = leading.empty() ? grad.to(bias_dtype) : at::sum(grad, leading, false, bias_dtype);
    }
    return found;
  }
};

at::Tensor linear(const at::Tensor& x, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                  const std::optional<at::Tensor>& A, const std::optional<at::Tensor>& B, const at::Tensor& lambda,
                  const at::Tensor& gamma, int64_t out_features, double scale, at::ScalarType dtype,
                  c10::string_view strategy, double dropout, const std::optional<at::Tensor>& seed,
                  bool weight_is_transposed, int64_t workspace, at::TensorList pattern,
                  std::optional<c10::string_view> backward_strategy) {
  const Fixed fixed{weight,
                    A,
                    B,
                    out_features,
                    scale,
                    dtype,
                    strategy,
                    backward_strategy.value_or(strategy),
                    dropout,
                    seed,
                    weight_is_transposed,
                    workspace,
                    pattern};
  const auto moves = [](const at::Tensor& t) {
    return t.defined() && t._fw_grad(0).defined();
  };
  TORCH_CHECK_NOT_IMPLEMENTED(!(moves(x) || moves(lambda) || moves(gamma) || (weight.has_value() && moves(*weight)) ||
                                (bias.has_value() && moves(*bias))),
                              "torch.ops.randlora.linear has no rule for forward-mode AD: call "
                              "randlora.functional.linear, outside of torch.compile");
  const bool graph = c10::GradMode::is_enabled() &&
                     (x.requires_grad() || lambda.requires_grad() || gamma.requires_grad() ||
                      (weight.has_value() && weight->requires_grad()) || (bias.has_value() && bias->requires_grad()));
  if (!graph) return below_autograd(x, lambda, gamma, bias, fixed);
  TORCH_CHECK_VALUE(!(weight.has_value() && weight->requires_grad()),
                    "the base weight is trainable: only the ordinary path can compute its gradient");
  return RandLoraLinear::apply(x, lambda, gamma, bias, fixed);
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, Autograd, m) { m.impl("linear", &linear); }

}  // namespace randlora
