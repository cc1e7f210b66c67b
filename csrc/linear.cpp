// The layer op: three strategies, forward and backward, on any device. The products are ATen's (MKL, oneDNN, cuBLAS),
// accumulating into their result (beta = 1), so that no pass over the output is spent on adding; the scaled base and
// its gradient are ours (unique_base.h).
//
// With m = min(in, out), M = max(in, out), T tokens, S2 = scale * lambda A gamma [P, m] and B2 [M, P]:
//   in <= out ("wide")   dW = B2 @ S2        h = x @ S2^T     y = x W^T + h @ B2^T     dS2 = (g @ B2)^T @ x
//   in >  out ("tall")   dW = S2^T @ B2^T    h = x @ B2       y = x W^T + h @ S2       dS2 = h^T @ g
// or, through the gradient G = g^T x of dW:  dS2 = B2^T @ G (wide), B2^T @ G^T (tall).
// Very sparse bases come as a pattern (sparse_update.h), which builds dW and takes G apart without S2 and B2; rows or
// columns of dW without a non-zero take no part in the products. On the CPU h is computed from what is non-zero as well
// (sparse_products.h): that is the factored strategy there, and what every strategy's backward gets the parameters'
// gradients from.
// Hadamard bases (hadamard.h) never need S2 or B2 either: "factored" transforms the tokens, the others build dW by
// transforms. On the CPU every strategy gets the parameters' gradients from the tokens, which take less than G alone.
// Packed bases (packed_update.h) that dense products are faster with, or that "factored" needs, are made dense in
// groups of rows k of A.
// Nothing of this is kept between forward and backward: the backward gets the same arguments and rebuilds what it
// needs.
#include "linear.h"

#include <algorithm>
#include <tuple>

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "hadamard.h"
#include "ops.h"
#include "packed_update.h"
#include "sparse_products.h"

namespace randlora {
namespace {

at::Tensor cast(const at::Tensor& t, at::ScalarType dtype) { return t.scalar_type() == dtype ? t : t.to(dtype); }

// narrow(), which costs a new tensor even where it cuts nothing off.
at::Tensor cut(const at::Tensor& t, int64_t axis, int64_t begin, int64_t length) {
  return t.size(axis) == length ? t : t.narrow(axis, begin, length);
}

// a @ b with an fp32 (fp64) result: what is reduced further must not be rounded to 16 bits first.
at::Tensor mm_accumulated(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() == at::kFloat || a.scalar_type() == at::kDouble) return at::mm(a, b);
  if (a.is_cuda()) return at::mm(a, b, at::kFloat);
  return at::mm(a.to(at::kFloat), b.to(at::kFloat));
}

class Layer {
 public:
  explicit Layer(const LayerArguments& a)
      : a_(a), in_(a.x.size(-1)), out_(a.out_features), wide_(in_ <= out_), m_(std::min(in_, out_)) {
    r_ = a.lambda.size(0);
    n_ = a.lambda.size(1);
    tokens_ = tokens_of(a.x);
    if (a.pattern.empty()) {
      A_ = cut(*a.A, 2, 0, m_);
      B2_ = cast(cut(cut(*a.B, 0, 0, std::max(in_, out_)), 1, 0, n_), a.dtype).flatten(1);
    }
    x_ = matrix(cast(a.x, a.dtype), in_);
    if (a.weight.has_value()) {
      const at::Tensor w = cast(*a.weight, a.dtype);
      weight_ = a.weight_is_transposed ? w.t() : w;
    }
    rows_ = rows_per_chunk(a, tokens_);
  }

  at::Tensor forward() const {
    const std::optional<at::Tensor> bias = a_.bias.has_value() ? std::optional(cast(*a_.bias, a_.dtype)) : std::nullopt;
    at::Tensor y;
    if (a_.strategy == Strategy::merged) {
      y = at::linear(x_, dense_update(weight_), bias);
    } else {
      const at::Tensor x = dropped(x_);
      if (weight_.defined()) y = at::linear(x_, weight_, bias);
      if (hadamard() && a_.strategy == Strategy::factored) {
        if (!y.defined()) y = at::zeros({tokens_, out_}, x.options());
        (wide_ ? hadamard_up_ : hadamard_down_)(y, x.contiguous(), a_.pattern, a_.lambda, a_.gamma, a_.scale);
      } else if (sparse() && a_.strategy == Strategy::factored) {
        if (!y.defined()) y = at::zeros({tokens_, out_}, x.options());
        wide_ ? cpu::sparse_up(y, x, a_.pattern, a_.lambda, a_.gamma, a_.scale)
              : cpu::sparse_down(y, x, a_.pattern, a_.lambda, a_.gamma, a_.scale);
      } else if (sparse()) {
        add_sparse_update(y, x);
      } else if (a_.strategy == Strategy::materialized) {
        accumulate(y, x, dense_update({}).t());
      } else {
        for_chunks([&](const Chunk&, const at::Tensor& S2, const at::Tensor& B2) {
          accumulate(y, wide_ ? x.mm(S2.t()) : x.mm(B2), wide_ ? B2.t() : S2);
        });
      }
    }
    if (a_.x.dim() == 2) return y;
    std::vector<int64_t> shape = a_.x.sizes().vec();
    shape.back() = out_;
    return y.view(shape);
  }

  // Gradients of x (in its dtype), lambda and gamma (in theirs); an empty tensor for what is not needed.
  std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad, bool need_x, bool need_lambda,
                                                          bool need_gamma) const {
    const at::Tensor g = matrix(cast(grad, a_.dtype), out_);
    const bool need_parameters = need_lambda || need_gamma;
    const at::Tensor x = need_parameters ? dropped(x_) : x_;
    const bool factored = a_.strategy == Strategy::factored;
    at::Tensor dx, dx_update;  // apart only where a dropout mask lies between them
    if (need_x) dx = input_gradient(g);
    at::Tensor& into = a_.dropout > 0 ? dx_update : dx;
    if (need_x && a_.strategy == Strategy::materialized) {
      if (sparse())
        add_sparse_input_gradient(into, g);
      else
        accumulate(into, g, dense_update({}));
    }

    at::Tensor dlambda, dgamma;
    if (hadamard()) {
      std::tie(dlambda, dgamma) = hadamard_backward(into, g, x, need_x && factored, need_lambda, need_gamma);
    } else if (sparse() && through_tokens()) {
      std::tie(dlambda, dgamma) = sparse_backward(into, g, x, need_x && factored, need_parameters);
      if (need_lambda) dlambda = cast(dlambda, a_.lambda.scalar_type());
      if (need_gamma) dgamma = cast(dgamma, a_.gamma.scalar_type());
    } else if (sparse()) {
      if (need_parameters)
        std::tie(dlambda, dgamma) = sparse_update_backward(row_gradient(g, x), a_.pattern, a_.lambda, a_.gamma,
                                                           a_.scale, need_lambda, need_gamma);
    } else if (factored || need_parameters) {
      const at::Tensor G = factored ? at::Tensor() : weight_gradient(g, x);
      if (rows_ < r_) dlambda = at::empty_like(a_.lambda);
      for_chunks(
          [&](const Chunk& chunk, const at::Tensor& S2, const at::Tensor& B2) {
            at::Tensor dS2;
            if (factored) {
              const at::Tensor dh = wide_ ? g.mm(B2) : g.mm(S2.t());
              if (need_x) accumulate(into, dh, wide_ ? S2 : B2.t());
              if (need_parameters) dS2 = wide_ ? mm_accumulated(dh.t(), x) : mm_accumulated(x.mm(B2).t(), g);
            } else {
              dS2 = mm_accumulated(B2.t(), wide_ ? G : G.t());
            }
            if (!need_parameters) return;
            const auto [dl, dg] = unique_base_backward(dS2.view({chunk.rows, n_, m_}), chunk.A, chunk.of(a_.lambda),
                                                       a_.gamma, a_.scale, need_lambda, need_gamma);
            if (need_lambda && rows_ < r_) chunk.of(dlambda).copy_(dl);
            if (need_lambda && rows_ == r_) dlambda = dl;
            if (need_gamma) dgamma = dgamma.defined() ? dgamma.add_(dg) : dg;
          },
          factored);
    }
    if (dx_update.defined()) dx = dx.defined() ? dx.add_(dropped(dx_update)) : dropped(dx_update);
    const auto none = [](const at::Tensor& like) {
      return at::empty({0}, like.options());
    };
    if (need_x) dx = cast(dx, a_.x.scalar_type());
    return {!need_x           ? none(a_.x)
            : a_.x.dim() == 2 ? dx
                              : dx.view(a_.x.sizes()),
            need_lambda ? dlambda : none(a_.lambda), need_gamma ? dgamma : none(a_.gamma)};
  }

 private:
  // [..., features] as [tokens, features].
  at::Tensor matrix(const at::Tensor& t, int64_t features) const {
    return t.dim() == 2 ? t : t.reshape({tokens_, features});
  }

  // y += a @ b, or y = a @ b where there is no y yet.
  static void accumulate(at::Tensor& y, const at::Tensor& a, const at::Tensor& b) {
    if (y.defined())
      y.addmm_(a, b);
    else
      y = at::mm(a, b);
  }

  at::Tensor dropped(const at::Tensor& t) const { return a_.dropout > 0 ? dropout(t, *a_.seed, a_.dropout) : t; }

  // A group of rows k of A.
  struct Chunk {
    int64_t row, rows;
    at::Tensor A;

    at::Tensor of(const at::Tensor& lambda) const { return cut(lambda, 0, row, rows); }
  };

  // function(chunk, its rows of S2, its columns of B2) for one group of rows k of A after the other. Rows k of A are
  // rows [k * n, ...) of S2 and, by RandLoRA's flattening, the columns of B2 of the same numbers.
  template <class Function>
  void for_chunks(const Function& function, bool need_S2 = true) const {
    for (int64_t row = 0; row < r_; row += rows_) {
      Chunk chunk{row, std::min(rows_, r_ - row), {}};
      at::Tensor S2, B2;
      if (a_.pattern.empty()) {
        chunk.A = chunk.of(A_);
        B2 = cut(B2_, 1, row * n_, chunk.rows * n_);
      } else {
        std::tie(chunk.A, B2) = packed_expand(a_.pattern, n_, m_, std::max(in_, out_), a_.dtype, row, chunk.rows);
        B2 = B2.t();
      }
      if (need_S2)
        S2 = unique_base(chunk.A, chunk.of(a_.lambda), a_.gamma, a_.scale, a_.dtype).view({chunk.rows * n_, m_});
      function(chunk, S2, B2);
    }
  }

  // dW [out, in], or `weight` + dW.
  at::Tensor dense_update(const at::Tensor& weight) const {
    if (hadamard() || sparse()) {
      std::optional<at::Tensor> rows;  // [m, M]
      if (weight.defined()) {
        rows = wide_ ? weight.t() : weight;
        // A clone: contiguous() would leave a single element the strides that it has, which may be any.
        if (rows->stride(0) != 1 && rows->stride(1) != 1) rows = rows->clone(at::MemoryFormat::Contiguous);
      }
      const at::Tensor sum = (hadamard() ? hadamard_update : sparse_update)(
          a_.pattern, a_.lambda, a_.gamma, std::max(in_, out_), a_.scale, rows, a_.dtype);
      return wide_ ? sum.t() : sum;
    }
    at::Tensor sum;
    for_chunks([&](const Chunk&, const at::Tensor& S2, const at::Tensor& B2) {
      const at::Tensor left = wide_ ? B2 : S2.t(), right = wide_ ? S2 : B2.t();
      if (sum.defined())
        sum.addmm_(left, right);
      else
        sum = weight.defined() ? at::addmm(weight, left, right) : at::mm(left, right);
    });
    return sum;
  }

  // ---- Hadamard bases ----

  bool hadamard() const { return is_hadamard(a_.pattern); }

  // The parameters' gradients, empty where they are not needed, and, if `add_input_gradient`, dx += g @ dW.
  std::tuple<at::Tensor, at::Tensor> hadamard_backward(at::Tensor& dx, const at::Tensor& g, const at::Tensor& x,
                                                       bool add_input_gradient, bool need_lambda,
                                                       bool need_gamma) const {
    const bool need_parameters = need_lambda || need_gamma;
    if (a_.strategy != Strategy::factored && a_.x.is_cuda()) {
      if (!need_parameters) return {};
      return hadamard_update_backward(row_gradient(g, x), a_.pattern, a_.lambda, a_.gamma, a_.scale, need_lambda,
                                      need_gamma);
    }
    std::optional<at::Tensor> into;
    if (add_input_gradient) {
      if (!dx.defined()) dx = at::zeros({tokens_, in_}, g.options());
      into = dx;
    }
    const at::Tensor from = g.contiguous();
    if (!need_parameters) {
      if (into.has_value())
        (wide_ ? hadamard_down_ : hadamard_up_)(*into, from, a_.pattern, a_.lambda, a_.gamma, a_.scale);
      return {};
    }
    const at::Tensor other = x.contiguous();
    const auto [dlambda, dgamma] =
        wide_ ? hadamard_gradients(other, from, into, {}, a_.pattern, a_.lambda, a_.gamma, a_.scale)
              : hadamard_gradients(from, other, {}, into, a_.pattern, a_.lambda, a_.gamma, a_.scale);
    return {cast(dlambda, a_.lambda.scalar_type()), cast(dgamma, a_.gamma.scalar_type())};
  }

  // ---- sparse bases: D [columns, M] holds what is not zero of dW (out <= in) or dW^T (in <= out) ----

  bool sparse() const { return !a_.pattern.empty() && !hadamard() && !unpacks(a_); }

  bool all_columns() const { return is_packed(a_.pattern) || a_.pattern[0].numel() == m_; }

  // Whether products with the tokens that leave out what is zero beat a dense one for the gradient of D: with lists.
  bool through_tokens() const { return !is_packed(a_.pattern); }

  // The parameters' gradients, and, if `add_input_gradient`, dx += g @ dW.
  std::tuple<at::Tensor, at::Tensor> sparse_backward(at::Tensor& dx, const at::Tensor& g, const at::Tensor& x,
                                                     bool add_input_gradient, bool need_parameters) const {
    std::optional<at::Tensor> into;
    if (add_input_gradient) {
      if (!dx.defined()) dx = at::zeros({tokens_, in_}, g.options());
      if (wide_)
        into = dx;
      else
        cpu::sparse_up(dx, g, a_.pattern, a_.lambda, a_.gamma, a_.scale);
    }
    if (need_parameters)
      return cpu::sparse_gradients(into, wide_ ? g : x, wide_ ? x : g, a_.pattern, a_.lambda, a_.gamma, a_.scale);
    if (into.has_value()) cpu::sparse_down(*into, g, a_.pattern, a_.lambda, a_.gamma, a_.scale);
    return {};
  }

  // The features of the smaller side that D has rows for.
  at::Tensor columns_of(const at::Tensor& t) const { return all_columns() ? t : t.index_select(1, a_.pattern[0]); }

  at::Tensor compact_update() const {
    return sparse_update(a_.pattern, a_.lambda, a_.gamma, std::max(in_, out_), a_.scale, std::nullopt, a_.dtype);
  }

  // y += x @ dW^T
  void add_sparse_update(at::Tensor& y, const at::Tensor& x) const {
    const at::Tensor D = compact_update();
    if (wide_)
      accumulate(y, columns_of(x), D);
    else
      add_columns(y, x, D.t(), out_);
  }

  // dx += g @ dW
  void add_sparse_input_gradient(at::Tensor& dx, const at::Tensor& g) const {
    const at::Tensor D = compact_update();
    if (wide_)
      add_columns(dx, g, D.t(), in_);
    else
      accumulate(dx, columns_of(g), D);
  }

  // y[:, columns] += a @ b; `width` is y's, where there is no y yet.
  void add_columns(at::Tensor& y, const at::Tensor& a, const at::Tensor& b, int64_t width) const {
    if (all_columns()) return accumulate(y, a, b);
    if (!y.defined()) y = at::zeros({tokens_, width}, a.options());
    y.index_add_(1, a_.pattern[0], at::mm(a, b));
  }

  // The base layer's part of x's gradient (merged: all of it).
  at::Tensor input_gradient(const at::Tensor& g) const {
    if (a_.strategy == Strategy::merged) return g.mm(dense_update(weight_));
    return weight_.defined() ? g.mm(weight_) : at::Tensor();
  }

  // The gradient of D [m, M], of which no row is left out.
  at::Tensor row_gradient(const at::Tensor& g, const at::Tensor& x) const {
    return wide_ ? mm_accumulated(x.t(), g) : mm_accumulated(g.t(), x);
  }

  // G = g^T x [out, in], the gradient of dW.
  at::Tensor weight_gradient(const at::Tensor& g, const at::Tensor& x) const {
    // On CUDA 16-bit G keeps the next product on the tensor cores; that product's result, dS2, is fp32.
    return g.is_cuda() ? at::mm(g.t(), x) : mm_accumulated(g.t(), x);
  }

  const LayerArguments& a_;
  int64_t in_, out_;
  bool wide_;
  int64_t m_, r_, n_, tokens_, rows_;
  at::Tensor A_, B2_, x_, weight_;
};

at::Tensor linear(const at::Tensor& x, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                  const std::optional<at::Tensor>& A, const std::optional<at::Tensor>& B, const at::Tensor& lambda,
                  const at::Tensor& gamma, int64_t out_features, double scale, at::ScalarType dtype,
                  c10::string_view strategy, double dropout, const std::optional<at::Tensor>& seed,
                  bool weight_is_transposed, int64_t workspace, at::TensorList pattern,
                  std::optional<c10::string_view> /*backward_strategy*/) {
  const PlainKernels guard;
  LayerArguments a{x,
                   weight,
                   bias,
                   A,
                   B,
                   lambda,
                   gamma,
                   out_features,
                   scale,
                   dtype,
                   parse_strategy(strategy, tokens_of(x)),
                   dropout,
                   seed,
                   weight_is_transposed,
                   workspace,
                   pattern.vec()};
  check(a);
  a.dtype = product_dtype(x, dtype);
  return cast(Layer(a).forward(), dtype);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(
    const at::Tensor& grad, const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& A, const std::optional<at::Tensor>& B, const at::Tensor& lambda,
    const at::Tensor& gamma, double scale, at::ScalarType dtype, c10::string_view strategy, double dropout,
    const std::optional<at::Tensor>& seed, bool weight_is_transposed, int64_t workspace, at::TensorList pattern,
    bool need_x, bool need_lambda, bool need_gamma) {
  const PlainKernels guard;
  TORCH_CHECK_VALUE(grad.dim() == x.dim() && grad.dim() >= 1,
                    "grad must have shape [..., out] with the leading shape of x ", x.sizes(), ", got ", grad.sizes());
  LayerArguments a{x,
                   weight,
                   std::nullopt,
                   A,
                   B,
                   lambda,
                   gamma,
                   grad.size(-1),
                   scale,
                   dtype,
                   parse_strategy(strategy, tokens_of(x)),
                   dropout,
                   seed,
                   weight_is_transposed,
                   workspace,
                   pattern.vec()};
  check(a);
  check_tensor(grad, "grad", x);
  TORCH_CHECK_VALUE(grad.sizes().slice(0, grad.dim() - 1) == x.sizes().slice(0, x.dim() - 1),
                    "grad must have the leading shape of x ", x.sizes(), ", got ", grad.sizes());
  a.dtype = product_dtype(x, dtype);
  return Layer(a).backward(grad, need_x, need_lambda, need_gamma);
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, CompositeExplicitAutograd, m) {
  m.impl("linear", &linear);
  m.impl("linear_backward", &linear_backward);
}

}  // namespace randlora
