// Layers with Hadamard bases (hadamard.h), which never need S2 or B2: the factored strategy transforms the tokens, the
// others build dW by transforms.
#include <optional>

#include "layer/layer.h"
#include "ops.h"

namespace randlora {
namespace {

class HadamardLayer final : public Layer {
 public:
  using Layer::Layer;

 private:
  void add_update(at::Tensor& y, const at::Tensor& x) const override {
    if (strategy_ == Strategy::materialized) return accumulate(y, x, matrix({}).t());
    (wide_ ? hadamard_up_ : hadamard_down_)(zeros_unless_defined(y, out_, x), x.contiguous(), a_.pattern, a_.lambda,
                                            a_.gamma, a_.scale);
  }

  ParameterGradients update_backward(at::Tensor& dx, const at::Tensor& g, const at::Tensor& x,
                                     const Needed& needed) const override {
    if (needed.x && strategy_ == Strategy::materialized) accumulate(dx, g, matrix({}));
    if (strategy_ == Strategy::factored) return through_tokens(dx, g.contiguous(), x, needed);
    if (!needed.parameters()) return {};
    // From the tokens on the CPU, which takes less than the gradient of dW alone.
    if (!a_.x.is_cuda()) return through_tokens(dx, g.contiguous(), x, {false, needed.lambda, needed.gamma});
    return hadamard_update_backward(update_gradient(g, x), a_.pattern, a_.lambda, a_.gamma, a_.scale, needed.lambda,
                                    needed.gamma);
  }

  at::Tensor matrix(const at::Tensor& weight) const override { return matrix_by(hadamard_update, weight); }

  ParameterGradients through_tokens(at::Tensor& dx, const at::Tensor& g, const at::Tensor& x,
                                    const Needed& needed) const {
    std::optional<at::Tensor> into;
    if (needed.x) into = zeros_unless_defined(dx, in_, g);
    if (needed.parameters()) {
      const at::Tensor others = x.contiguous();
      return wide_ ? hadamard_gradients(others, g, into, {}, a_.pattern, a_.lambda, a_.gamma, a_.scale)
                   : hadamard_gradients(g, others, {}, into, a_.pattern, a_.lambda, a_.gamma, a_.scale);
    }
    if (needed.x) (wide_ ? hadamard_down_ : hadamard_up_)(dx, g, a_.pattern, a_.lambda, a_.gamma, a_.scale);
    return {};
  }
};

}  // namespace

std::unique_ptr<Layer> make_hadamard_layer(const LayerArguments& a, Strategy strategy) {
  return std::make_unique<HadamardLayer>(a, strategy);
}

}  // namespace randlora
