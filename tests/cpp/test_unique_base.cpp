// randlora::unique_base and its backward against the plain loops of their definition, in float64. The bounds are those
// of the arithmetic: one rounding per multiplication, one per addition, one for the result.
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/randn.h>

#include "check.h"

namespace {

at::Tensor unique_base(const at::Tensor& A, const at::Tensor& lambda, const at::Tensor& gamma, double scale) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("randlora::unique_base", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, double,
                                               std::optional<at::ScalarType>)>();
  return op.call(A, lambda, gamma, scale, A.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> unique_base_backward(const at::Tensor& grad, const at::Tensor& A,
                                                        const at::Tensor& lambda, const at::Tensor& gamma,
                                                        double scale) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("randlora::unique_base_backward", "")
          .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                    const at::Tensor&, double, bool, bool)>();
  return op.call(grad, A, lambda, gamma, scale, true, true);
}

// Half the distance from 1 to the next number: the relative error of one rounding.
double unit_roundoff(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return 0x1p-53;
    case at::kFloat: return 0x1p-24;
    case at::kHalf: return 0x1p-11;
    default: return 0x1p-8;
  }
}

// Below it a 16-bit float has fewer digits than its unit roundoff promises.
double smallest_step(at::ScalarType type) { return type == at::kHalf ? 0x1p-24 : 1e-40; }

struct Case {
  int64_t r, n, m;
  at::ScalarType storage, parameters;
  bool sliced;  // A is the leading slice of a wider, taller base, not contiguous
};

void compare(const Case& c) {
  const double scale = 1.7;
  const at::Tensor base = at::randn({c.r + 2, 1, c.m + 5}, c.storage);
  const at::Tensor A =
      c.sliced ? base.slice(0, 0, c.r).slice(2, 0, c.m) : base.slice(0, 0, c.r).slice(2, 0, c.m).contiguous();
  const at::Tensor lambda = at::randn({c.r, c.n}, c.parameters), gamma = at::randn({c.n, c.m}, c.parameters);
  const at::Tensor grad = at::randn({c.r, c.n, c.m}, c.storage);

  const at::Tensor S = unique_base(A, lambda, gamma, scale);
  const auto [dlambda, dgamma] = unique_base_backward(grad, A, lambda, gamma, scale);
  const auto [dlambda_again, dgamma_again] = unique_base_backward(grad, A, lambda, gamma, scale);
  const std::string where = check::text("r ", c.r, " n ", c.n, " m ", c.m, " A ", c.storage, " lambda ", c.parameters,
                                        c.sliced ? " sliced " : " ");
  CHECK_THAT(S.sizes() == grad.sizes() && S.is_contiguous() && S.scalar_type() == c.storage, where, "S ", S.sizes());
  CHECK_THAT(dlambda.sizes() == lambda.sizes() && dgamma.sizes() == gamma.sizes(), where, dlambda.sizes(),
             dgamma.sizes());
  CHECK_THAT(dlambda.equal(dlambda_again) && dgamma.equal(dgamma_again), where,
             "the backward does not repeat its bits");

  const at::Tensor tensors[] = {A.to(at::kDouble).contiguous(), lambda.to(at::kDouble), gamma.to(at::kDouble),
                                grad.to(at::kDouble),           S.to(at::kDouble),      dlambda.to(at::kDouble),
                                dgamma.to(at::kDouble)};
  const auto a = tensors[0].accessor<double, 3>();
  const auto l = tensors[1].accessor<double, 2>(), g = tensors[2].accessor<double, 2>();
  const auto G = tensors[3].accessor<double, 3>(), s = tensors[4].accessor<double, 3>();
  const auto dl = tensors[5].accessor<double, 2>(), dg = tensors[6].accessor<double, 2>();

  const bool fp64 = c.storage == at::kDouble || c.parameters == at::kDouble;
  const double step = unit_roundoff(fp64 ? at::kDouble : at::kFloat);
  // `sum` is the true value, `size` the sum of the absolute values of its `terms` terms.
  const auto near = [&](double got, double sum, double size, int64_t terms, at::ScalarType result) {
    const double rounded = unit_roundoff(result) * std::abs(sum) * 1.01 + smallest_step(result);
    return std::abs(got - sum) <= rounded + step * double(terms + 4) * size;
  };

  for (int64_t k = 0; k < c.r; ++k)
    for (int64_t i = 0; i < c.n; ++i) {
      double sum = 0, size = 0;
      for (int64_t j = 0; j < c.m; ++j) {
        const double expected = scale * l[k][i] * a[k][0][j] * g[i][j];
        CHECK_THAT(near(s[k][i][j], expected, std::abs(expected), 0, S.scalar_type()), where, "S[", k, ", ", i, ", ", j,
                   "]: got ", s[k][i][j], ", expected ", expected);
        sum += scale * G[k][i][j] * a[k][0][j] * g[i][j];
        size += std::abs(scale * G[k][i][j] * a[k][0][j] * g[i][j]);
      }
      CHECK_THAT(near(dl[k][i], sum, size, c.m, dlambda.scalar_type()), where, "dlambda[", k, ", ", i, "]: got ",
                 dl[k][i], ", expected ", sum);
    }
  for (int64_t i = 0; i < c.n; ++i)
    for (int64_t j = 0; j < c.m; ++j) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < c.r; ++k) {
        sum += scale * G[k][i][j] * a[k][0][j] * l[k][i];
        size += std::abs(scale * G[k][i][j] * a[k][0][j] * l[k][i]);
      }
      CHECK_THAT(near(dg[i][j], sum, size, c.r, dgamma.scalar_type()), where, "dgamma[", i, ", ", j, "]: got ",
                 dg[i][j], ", expected ", sum);
    }
}

void compare_all(at::ScalarType storage, at::ScalarType parameters) {
  constexpr int64_t shapes[][3] = {{1, 1, 1},    {3, 5, 7},     {1, 41, 3},  {4, 3, 41},
                                   {8, 2, 1000}, {33, 11, 341}, {2, 1, 2500}};
  for (const auto& [r, n, m] : shapes)
    for (const bool sliced : {false, true}) compare({r, n, m, storage, parameters, sliced});
}

}  // namespace

int main() {
  check::run("unique_base float64", [] {
    compare_all(at::kDouble, at::kDouble);
  });
  check::run("unique_base float32", [] {
    compare_all(at::kFloat, at::kFloat);
  });
  check::run("unique_base bfloat16", [] {
    compare_all(at::kBFloat16, at::kBFloat16);
  });
  check::run("unique_base float16", [] {
    compare_all(at::kHalf, at::kHalf);
  });
  check::run("unique_base bfloat16, parameters in float32", [] {
    compare_all(at::kBFloat16, at::kFloat);
  });
  return check::finish();
}
