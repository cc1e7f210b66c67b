// The kernels of `linear` and `linear_backward`, for every device: what they need of one are ops as well.
#include <torch/library.h>

#include "layer/layer.h"
#include "layer/schema.h"
#include "ops.h"

namespace randlora {
namespace {

at::Tensor forward(const LayerArguments& a) {
  const SkipAutogradAndAutocast guard;
  check(a);
  return make_layer(a)->forward();
}

LayerGradients backward(const at::Tensor& grad, const LayerArguments& a, const Needed& needed) {
  const SkipAutogradAndAutocast guard;
  check_grad(grad, a);
  check(a);
  return make_layer(a)->backward(grad, needed);
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, CompositeExplicitAutograd, m) {
  m.impl("linear", &linear_kernel<forward>);
  m.impl("linear_backward", &linear_backward_kernel<backward>);
}

}  // namespace randlora
