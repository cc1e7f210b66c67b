// The update of Hadamard bases on the CPU: the algebra of hadamard.h in ATen's operations.
#include "hadamard.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ops.h"

namespace randlora::cpu {
namespace {

// One layer's parameters in the order of groups. Column j of x is at g * columns + (j / (w R)) * w + j % w.
struct Parameters {
  const HadamardShape s;
  at::Tensor lambda, gamma;  // [r, n] with c and scale, [R, columns, n] with a
  at::Tensor position, b;    // [m], [M]

  Parameters(const HadamardShape& s, const at::Tensor& lambda, const at::Tensor& gamma, double scale,
             at::ScalarType type)
      : s(s) {
    const auto options = gamma.options().dtype(type);
    this->lambda = (lambda.to(type) * signs(s.c, s.P, options).view({s.r, s.n})).mul_(scale);
    b = signs(s.b, s.M, options);
    position = at::empty({s.m}, options.dtype(at::kLong));
    for (int64_t j = 0; j < s.m; ++j)
      position.mutable_data_ptr<int64_t>()[j] =
          j / s.width % s.R * s.columns + j / (s.width * s.R) * s.width + j % s.width;
    this->gamma = at::zeros({s.R * s.columns, s.n}, options);
    a = signs(s.a, s.m, options);
    this->gamma.index_copy_(0, position, gamma.to(type).mul(a).t());
    this->gamma = this->gamma.view({s.R, s.columns, s.n});
  }

  // [T, m] to [R, T, columns]
  at::Tensor grouped(const at::Tensor& x) const {
    const at::Tensor all = at::zeros({x.size(0), s.R * s.columns}, gamma.options());
    all.index_copy_(1, position, x.to(gamma.scalar_type()));
    return all.view({x.size(0), s.R, s.columns}).transpose(0, 1);
  }

  // v [T, r, n] of x [R, T, columns]
  at::Tensor hidden(const at::Tensor& x) const {
    return transform(at::bmm(x, gamma).permute({1, 2, 0})).narrow(2, 0, s.r).transpose(1, 2);
  }

  at::Tensor up(const at::Tensor& v) const {
    const at::Tensor h = (v * lambda).reshape({v.size(0), s.P});
    return transform(padded(h, s.N)).narrow(1, 0, s.M).mul(b);
  }

  // z [T, r, n] without c of x [T, M]
  at::Tensor hidden_down(const at::Tensor& x) const {
    return transform(padded(x.to(gamma.scalar_type()) * b, s.N)).narrow(1, 0, s.P).reshape({x.size(0), s.r, s.n});
  }

  // du [R, T, n]
  at::Tensor grouped_down(const at::Tensor& z) const {
    return transform(padded((z * lambda).transpose(1, 2), s.R)).permute({2, 0, 1});
  }

  at::Tensor ungrouped(const at::Tensor& y) const {
    return y.transpose(0, 1).reshape({y.size(1), s.R * s.columns}).index_select(1, position);
  }

  at::Tensor down(const at::Tensor& du) const { return ungrouped(at::bmm(du, gamma.transpose(1, 2))); }

  std::tuple<at::Tensor, at::Tensor> gradients(const at::Tensor& x, const at::Tensor& v, const at::Tensor& z,
                                               const at::Tensor& du, double scale) const {
    const at::Tensor dlambda = (v * z).sum(0) * signs(s.c, s.P, b.options()).view({s.r, s.n}) * scale;
    const at::Tensor dgamma = at::bmm(x.transpose(1, 2), du);  // [R, columns, n]
    return {dlambda, dgamma.view({s.R * s.columns, s.n}).index_select(0, position).t() * a};
  }

 private:
  at::Tensor a;

  static at::Tensor signs(const int32_t* words, int64_t count, const at::TensorOptions& options) {
    const at::Tensor result = at::empty({count}, options.dtype(at::kDouble));
    for (int64_t x = 0; x < count; ++x)
      result.mutable_data_ptr<double>()[x] = uint32_t(words[x / 32]) >> (x % 32) & 1 ? -1.0 : 1.0;
    return result.to(options);
  }

  static at::Tensor padded(const at::Tensor& t, int64_t length) {
    std::vector<int64_t> rest = t.sizes().vec();
    rest.back() = length - rest.back();
    return at::cat({t, at::zeros(rest, t.options())}, -1);
  }

  static at::Tensor transform(at::Tensor t) {
    std::vector<int64_t> shape = t.sizes().vec();
    const int64_t length = shape.back(), rest = shape[0] * (shape.size() == 3 ? shape[1] : 1);
    for (int64_t half = 1; half < length; half *= 2) {
      t = t.reshape({rest, length / (2 * half), 2, half});
      const at::Tensor first = t.select(2, 0), second = t.select(2, 1);
      t = at::stack({first + second, first - second}, 2);
    }
    return t.reshape(shape);
  }
};

// function(first token, tokens) of one tile after the other.
template <class Function>
void for_tiles(int64_t tokens, const HadamardShape& s, const Function& function) {
  const int64_t tile = std::max<int64_t>(1, (int64_t{1} << 18) / s.N);
  for (int64_t first = 0; first < tokens; first += tile) function(first, std::min(tile, tokens - first));
}

void up(const at::Tensor& out, const at::Tensor& x, at::TensorList pattern, const at::Tensor& lambda,
        const at::Tensor& gamma, double scale) {
  const PlainKernels guard;
  const Parameters p(check_hadamard_tokens(x, out, pattern, lambda, gamma), lambda, gamma, scale,
                     hadamard_sums(x.scalar_type()));
  for_tiles(x.size(0), p.s, [&](int64_t first, int64_t tokens) {
    out.narrow(0, first, tokens).add_(p.up(p.hidden(p.grouped(x.narrow(0, first, tokens)))));
  });
}

void down(const at::Tensor& out, const at::Tensor& x, at::TensorList pattern, const at::Tensor& lambda,
          const at::Tensor& gamma, double scale) {
  const PlainKernels guard;
  const Parameters p(check_hadamard_tokens(out, x, pattern, lambda, gamma), lambda, gamma, scale,
                     hadamard_sums(x.scalar_type()));
  for_tiles(x.size(0), p.s, [&](int64_t first, int64_t tokens) {
    out.narrow(0, first, tokens).add_(p.down(p.grouped_down(p.hidden_down(x.narrow(0, first, tokens)))));
  });
}

std::tuple<at::Tensor, at::Tensor> gradients(const at::Tensor& narrow, const at::Tensor& wide,
                                             const std::optional<at::Tensor>& into_narrow,
                                             const std::optional<at::Tensor>& into_wide, at::TensorList pattern,
                                             const at::Tensor& lambda, const at::Tensor& gamma, double scale) {
  const PlainKernels guard;
  const Parameters p(check_hadamard_gradients(narrow, wide, into_narrow, into_wide, pattern, lambda, gamma), lambda,
                     gamma, scale, hadamard_sums(narrow.scalar_type()));
  const at::Tensor dlambda = at::zeros({p.s.r, p.s.n}, p.lambda.options());
  const at::Tensor dgamma = at::zeros({p.s.n, p.s.m}, p.lambda.options());
  for_tiles(narrow.size(0), p.s, [&](int64_t first, int64_t tokens) {
    const at::Tensor x = p.grouped(narrow.narrow(0, first, tokens)), v = p.hidden(x);
    const at::Tensor z = p.hidden_down(wide.narrow(0, first, tokens)), du = p.grouped_down(z);
    if (into_narrow.has_value()) into_narrow->narrow(0, first, tokens).add_(p.down(du));
    if (into_wide.has_value()) into_wide->narrow(0, first, tokens).add_(p.up(v));
    const auto [dl, dg] = p.gradients(x, v, z, du, scale);
    dlambda.add_(dl);
    dgamma.add_(dg);
  });
  return {dlambda, dgamma};
}

at::Tensor update(at::TensorList pattern, const at::Tensor& lambda, const at::Tensor& gamma, int64_t max_dim,
                  double scale, const std::optional<at::Tensor>& weight, at::ScalarType dtype) {
  const PlainKernels guard;
  const at::Tensor out = make_hadamard_update(pattern, lambda, gamma, max_dim, weight, dtype);
  const at::ScalarType type = hadamard_sums(dtype);
  const at::Tensor sum = at::zeros(out.sizes(), out.options().dtype(type));
  if (weight.has_value()) sum.copy_(*weight);
  up(sum, at::eye(gamma.size(1), sum.options()), pattern, lambda, gamma, scale);
  return out.copy_(sum);
}

std::tuple<at::Tensor, at::Tensor> update_backward(const at::Tensor& grad, at::TensorList pattern,
                                                   const at::Tensor& lambda, const at::Tensor& gamma, double scale,
                                                   bool need_lambda, bool need_gamma) {
  const PlainKernels guard;
  check_hadamard_grad(grad, pattern, lambda, gamma);
  const auto [dlambda, dgamma] = gradients(at::eye(gamma.size(1), grad.options()), grad.contiguous(), std::nullopt,
                                           std::nullopt, pattern, lambda, gamma, scale);
  const auto none = [](const at::Tensor& like) {
    return at::empty({0}, like.options());
  };
  return {need_lambda ? dlambda.to(lambda.scalar_type()) : none(lambda),
          need_gamma ? dgamma.to(gamma.scalar_type()) : none(gamma)};
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, CPU, m) {
  m.impl("hadamard_up_", &up);
  m.impl("hadamard_down_", &down);
  m.impl("hadamard_gradients", &gradients);
  m.impl("hadamard_update", &update);
  m.impl("hadamard_update_backward", &update_backward);
}

}  // namespace randlora::cpu
