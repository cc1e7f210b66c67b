// How a layer is computed: three strategies, forward and backward, on any device. The products are ATen's (MKL, oneDNN,
// cuBLAS), accumulating into their result (beta = 1), so that no pass over the output is spent on adding.
//
// With m = min(in, out), M = max(in, out), T tokens, S2 = scale * lambda A gamma [P, m] and B2 [M, P]:
//   in <= out ("wide")   dW = B2 @ S2        h = x @ S2^T     y = x W^T + h @ B2^T     dS2 = (g @ B2)^T @ x
//   in >  out ("tall")   dW = S2^T @ B2^T    h = x @ B2       y = x W^T + h @ S2       dS2 = h^T @ g
// or, through the gradient G = g^T x of dW:  dS2 = B2^T @ G (wide), B2^T @ G^T (tall).
//
// The form of the bases decides how the update is computed: dense.cpp, ternary.cpp and hadamard.cpp. Nothing is kept
// between forward and backward: the backward gets the same arguments and rebuilds what it needs.
#pragma once

#include <memory>
#include <tuple>

#include <ATen/core/Tensor.h>

#include "layer/arguments.h"
#include "update.h"

namespace randlora {

using ParameterGradients = std::tuple<at::Tensor, at::Tensor>;  // of lambda and gamma

// One call. Its arguments must outlive it.
class Layer {
 public:
  Layer(const LayerArguments& a, Strategy strategy);
  virtual ~Layer() = default;

  at::Tensor forward() const;
  LayerGradients backward(const at::Tensor& grad, const Needed& needed) const;

 protected:
  // ---- what depends on the form of the bases ----

  // y += x dW^T by the strategies factored and materialized. An undefined y is zero; so is dx below.
  virtual void add_update(at::Tensor& y, const at::Tensor& x) const = 0;

  // Returns the gradients of lambda and gamma, undefined where they are not needed. If needed.x, dx += g dW, except by
  // the merged strategy: there, the product with W + dW includes it.
  virtual ParameterGradients update_backward(at::Tensor& dx, const at::Tensor& g, const at::Tensor& x,
                                             const Needed& needed) const = 0;

  // dW [out, in], or `weight` + dW where that is defined.
  virtual at::Tensor matrix(const at::Tensor& weight) const = 0;

  // ---- products ----

  // y += a @ b, or y = a @ b where there is no y yet.
  static void accumulate(at::Tensor& y, const at::Tensor& a, const at::Tensor& b);

  // y, or zeros [tokens, features] where there is no y yet.
  const at::Tensor& zeros_unless_defined(at::Tensor& y, int64_t features, const at::Tensor& like) const;

  // The gradient of D [m, M] (dW^T where in <= out, dW otherwise), fp32 or fp64.
  at::Tensor update_gradient(const at::Tensor& g, const at::Tensor& x) const;

  // D, or weight + D, made by an op that takes the weight as [m, M] with one stride of 1; as [out, in].
  template <class Build>
  at::Tensor matrix_by(const Build& build, const at::Tensor& weight) const {
    std::optional<at::Tensor> rows;
    if (weight.defined()) {
      rows = wide_ ? weight.t() : weight;
      // A clone: contiguous() would leave a single element the strides that it has, which may be any.
      if (rows->stride(0) != 1 && rows->stride(1) != 1) rows = rows->clone(at::MemoryFormat::Contiguous);
    }
    const at::Tensor sum = build(a_.pattern, a_.lambda, a_.gamma, sizes_.M, a_.scale, rows, dtype_);
    return wide_ ? sum.t() : sum;
  }

  const LayerArguments& a_;
  Strategy strategy_;
  at::ScalarType dtype_;  // of the products
  int64_t in_, out_, tokens_;
  LayerSizes sizes_;
  bool wide_;          // in <= out
  at::Tensor x_;       // [tokens, in]
  at::Tensor weight_;  // [out, in], undefined where there is none

 private:
  at::Tensor tokens(const at::Tensor& t, int64_t features) const;
  at::Tensor dropped(const at::Tensor& t) const;
};

// The layer with the bases that the arguments have, which are checked.
std::unique_ptr<Layer> make_layer(const LayerArguments& a);

std::unique_ptr<Layer> make_dense_layer(const LayerArguments& a, Strategy strategy);
std::unique_ptr<Layer> make_ternary_layer(const LayerArguments& a, Strategy strategy);
std::unique_ptr<Layer> make_hadamard_layer(const LayerArguments& a, Strategy strategy);

at::Tensor cast(const at::Tensor& t, at::ScalarType dtype);

// narrow(), which costs a new tensor even where it cuts nothing off.
at::Tensor cut(const at::Tensor& t, int64_t axis, int64_t begin, int64_t length);

// a @ b with an fp32 (fp64) result: what is reduced further must not be rounded to 16 bits first.
at::Tensor mm_accumulated(const at::Tensor& a, const at::Tensor& b);

}  // namespace randlora
