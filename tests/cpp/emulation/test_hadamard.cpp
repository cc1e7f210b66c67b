// The kernels of csrc/cuda/hadamard*.cu on the CPU against the dense update in float64, written out element by element
// from its definition. Every case runs in both orders of threads and blocks, and all memory is born as NaN.
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <cuda_runtime.h>

#include "../check.h"
#include "ops.h"

namespace {

using Pair = std::tuple<at::Tensor, at::Tensor>;
using OptionalTensor = std::optional<at::Tensor>;

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

const c10::DispatchKeySet kCuda(c10::DispatchKey::CUDA);

struct Case {
  int64_t r, n, m, M, w, tokens;
};

double sign(const at::Tensor& words, int64_t x) {
  return uint32_t(words.const_data_ptr<int32_t>()[x / 32]) >> (x % 32) & 1 ? -1.0 : 1.0;
}

double walsh(int64_t x, int64_t y) { return __builtin_popcountll(uint64_t(x & y)) % 2 == 0 ? 1.0 : -1.0; }

// A layer with its bases written out, and tokens of `type`.
struct Layer {
  Case c;
  std::vector<at::Tensor> pattern;
  at::Tensor lambda, gamma, A, B2, narrow, wide;
  double scale = 0.7, allowed;
  std::string where;

  Layer(const Case& c, at::ScalarType type, at::ScalarType parameters) : c(c) {
    const int64_t P = c.n * c.r;
    int64_t R = 1;
    while (R < c.r) R *= 2;
    for (const int64_t size : {c.m, c.M, P})  // a store's signs, more than this layer has
      pattern.push_back(at::randint(-2147483647, 2147483647, {size / 32 + 2}, at::kInt));
    pattern.push_back(at::empty({c.w, 0}, at::kChar));
    lambda = at::randn({c.n, c.r}, parameters).t(), gamma = at::randn({c.n, c.m}, parameters);
    A = at::empty({c.r, c.m}, at::kDouble), B2 = at::empty({c.M, P}, at::kDouble);
    for (int64_t k = 0; k < c.r; ++k)
      for (int64_t j = 0; j < c.m; ++j)
        A.mutable_data_ptr<double>()[k * c.m + j] = sign(pattern[0], j) * walsh(k, j / c.w % R);
    for (int64_t o = 0; o < c.M; ++o)
      for (int64_t p = 0; p < P; ++p)
        B2.mutable_data_ptr<double>()[o * P + p] = sign(pattern[1], o) * sign(pattern[2], p) * walsh(o, p);
    narrow = at::randn({c.tokens, c.m}, type), wide = at::randn({c.tokens, c.M}, type);
    allowed = type == at::kDouble ? 1e-13 : type == at::kFloat ? 1e-6 : type == at::kHalf ? 1.5e-3 : 1.2e-2;
    where = check::text("r ", c.r, " n ", c.n, " m ", c.m, " M ", c.M, " w ", c.w, " T ", c.tokens, " ", type,
                        " parameters ", parameters);
  }

  at::Tensor update() const {  // [m, M]
    const at::Tensor l = lambda.to(at::kDouble), g = gamma.to(at::kDouble);
    const at::Tensor S2 = (scale * l.unsqueeze(2) * A.unsqueeze(1) * g).reshape({c.r * c.n, c.m});
    return S2.t().mm(B2.t());
  }

  Pair gradients(const at::Tensor& G) const {  // of the update's gradient [m, M]
    const at::Tensor t = scale * G.mm(B2).t().reshape({c.r, c.n, c.m}) * A.unsqueeze(1);
    return {(t * gamma.to(at::kDouble)).sum(2), (t * lambda.to(at::kDouble).unsqueeze(2)).sum(0)};
  }

  // Whether `got` is before + change but for rounding, which is as large where the two cancel out.
  void same(const at::Tensor& got, const at::Tensor& before, const at::Tensor& change, const char* what) const {
    const at::Tensor exact = before.to(at::kDouble) + change;
    const double size = std::hypot(before.to(at::kDouble).norm().item<double>(), change.norm().item<double>());
    const double error = (got.to(at::kDouble) - exact).norm().item<double>() / (size > 0 ? size : 1);
    CHECK_THAT(got.sizes() == exact.sizes() && error <= allowed, where, " ", what, ": error ", error);
  }

  void same(const at::Tensor& got, const at::Tensor& exact, const char* what) const {
    same(got, at::zeros_like(exact), exact, what);
  }
};

// function() in both orders; whether its results agree.
template <class Function>
std::vector<at::Tensor> both(const Layer& layer, const char* what, const Function& function) {
  const std::vector<at::Tensor> forwards = function();
  emulation::backwards = true;
  const std::vector<at::Tensor> backwards = function();
  emulation::backwards = false;
  for (size_t i = 0; i < forwards.size(); ++i)
    CHECK_THAT(forwards[i].equal(backwards[i]), layer.where, " ", what, ": the order of threads and blocks shows");
  return forwards;
}

void compare_tokens(const Layer& s) {
  static const auto up = find<decltype(randlora::hadamard_up_)>("randlora::hadamard_up_");
  static const auto down = find<decltype(randlora::hadamard_down_)>("randlora::hadamard_down_");
  static const auto gradients = find<decltype(randlora::hadamard_gradients)>("randlora::hadamard_gradients");
  const at::Tensor D = s.update(), x = s.narrow.to(at::kDouble), g = s.wide.to(at::kDouble);
  const at::Tensor narrow_before = at::randn_like(s.narrow), wide_before = at::randn_like(s.wide);
  const at::Tensor to_narrow = g.mm(D.t()), to_wide = x.mm(D);

  const auto y = both(s, "up", [&]() -> std::vector<at::Tensor> {
    const at::Tensor out = wide_before.clone();
    up.redispatch(kCuda, out, s.narrow, s.pattern, s.lambda, s.gamma, s.scale);
    return {out};
  });
  s.same(y[0], wide_before, to_wide, "up");
  const auto z = both(s, "down", [&]() -> std::vector<at::Tensor> {
    const at::Tensor out = narrow_before.clone();
    down.redispatch(kCuda, out, s.wide, s.pattern, s.lambda, s.gamma, s.scale);
    return {out};
  });
  s.same(z[0], narrow_before, to_narrow, "down");
  const auto [dlambda, dgamma] = s.gradients(x.t().mm(g));
  for (const int into : {0, 1, 2}) {
    const auto found = both(s, "gradients", [&]() -> std::vector<at::Tensor> {
      const OptionalTensor into_narrow = into == 1 ? OptionalTensor(narrow_before.clone()) : std::nullopt;
      const OptionalTensor into_wide = into == 2 ? OptionalTensor(wide_before.clone()) : std::nullopt;
      const auto [dl, dg] =
          gradients.redispatch(kCuda, s.narrow, s.wide, into_narrow, into_wide, s.pattern, s.lambda, s.gamma, s.scale);
      return {dl, dg, into == 1 ? *into_narrow : into == 2 ? *into_wide : dl};
    });
    s.same(found[0], dlambda, "dlambda");
    s.same(found[1], dgamma, "dgamma");
    if (into == 1) s.same(found[2], narrow_before, to_narrow, "into_narrow");
    if (into == 2) s.same(found[2], wide_before, to_wide, "into_wide");
  }
}

void compare_update(const Layer& s, at::ScalarType type) {
  static const auto update = find<decltype(randlora::hadamard_update)>("randlora::hadamard_update");
  static const auto backward = find<decltype(randlora::hadamard_update_backward)>("randlora::hadamard_update_backward");
  const at::Tensor D = s.update();
  const at::Tensor rows = at::randn({s.c.m, s.c.M + 3}, type).narrow(1, 1, s.c.M);
  const at::Tensor columns = at::randn({s.c.M, s.c.m}, type).t();
  for (const OptionalTensor& weight : {OptionalTensor(), OptionalTensor(rows), OptionalTensor(columns)}) {
    const auto found = both(s, "update", [&]() -> std::vector<at::Tensor> {
      return {update.redispatch(kCuda, s.pattern, s.lambda, s.gamma, s.c.M, s.scale, weight, type)};
    });
    s.same(found[0], weight.value_or(at::zeros_like(D)), D, "update");
    CHECK_THAT(found[0].scalar_type() == type, s.where);
  }
  const at::Tensor grad = at::randn({s.c.M, s.c.m}, type == at::kDouble ? at::kDouble : at::kFloat).t();
  const auto [dlambda, dgamma] = s.gradients(grad.to(at::kDouble));
  const auto found = both(s, "update's gradients", [&]() -> std::vector<at::Tensor> {
    const auto [dl, dg] = backward.redispatch(kCuda, grad, s.pattern, s.lambda, s.gamma, s.scale, true, true);
    return {dl, dg};
  });
  s.same(found[0], dlambda, "dlambda of the update");
  s.same(found[1], dgamma, "dgamma of the update");
}

void shapes() {
  // r: 1, below and beyond a power of two, more groups than a thread holds, and twice as many again; n below full, and
  // beyond; M below L, and L of several lengths; 1 token, few and many, of several to a block.
  const Case cases[] = {{1, 1, 1, 1, 1, 1},        {1, 5, 3, 41, 2, 3},      {4, 10, 37, 40, 8, 9},
                        {3, 41, 100, 260, 8, 20},  {12, 9, 96, 100, 4, 11},  {32, 3, 96, 96, 1, 8},
                        {32, 12, 384, 640, 4, 13}, {33, 4, 130, 1000, 2, 5}, {128, 3, 341, 342, 1, 9},
                        {300, 2, 41, 600, 1, 10},  {8, 70, 64, 64, 8, 4},    {16, 20, 341, 5000, 8, 17}};
  for (const Case& c : cases)
    for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
      const Layer layer(c, type, type == at::kDouble ? at::kDouble : at::kFloat);
      compare_tokens(layer);
      compare_update(layer, type);
    }
  compare_tokens(Layer({12, 9, 96, 100, 4, 11}, at::kBFloat16, at::kBFloat16));
  compare_tokens(Layer({12, 9, 96, 100, 4, 11}, at::kFloat, at::kDouble));
}

// Several tokens for each block of collect; several chunks; a block's longest transform.
void long_ones() {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16})
    compare_tokens(Layer({32, 128, 40, 70, 1, 900}, type, at::kFloat));
  compare_tokens(Layer({32, 1000, 40, 70, 1, 270}, at::kFloat, at::kFloat));
  compare_tokens(Layer({4, 3000, 40, 70, 8, 9}, at::kDouble, at::kDouble));
  compare_update(Layer({33, 500, 40, 70, 1, 1}, at::kFloat, at::kFloat), at::kFloat);
}

void too_long() {
  std::string message;
  try {
    compare_tokens(Layer({32, 1000, 4, 5, 1, 1}, at::kDouble, at::kDouble));
  } catch (const std::exception& error) {
    message = error.what();
  }
  CHECK_THAT(message.find("n r <= 16384 in float64, got n r = 32000") != message.npos, message);
}

// Where views of larger tensors begin is not where packs of elements may.
void unaligned() {
  static const auto up = find<decltype(randlora::hadamard_up_)>("randlora::hadamard_up_");
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    Layer s({8, 8, 64, 128, 8, 12}, type, at::kFloat == type ? at::kFloat : at::kDouble);
    s.narrow = at::randn({12 * 64 + 1}, type).narrow(0, 1, 12 * 64).view({12, 64});
    s.gamma = at::randn({8 * 64 + 1}, s.gamma.scalar_type()).narrow(0, 1, 8 * 64).view({8, 64});
    s.wide = at::randn({12 * 128 + 1}, type).narrow(0, 1, 12 * 128).view({12, 128});
    compare_tokens(s);
    const at::Tensor out = at::zeros({12 * 128 + 1}, s.wide.options()).narrow(0, 1, 12 * 128).view({12, 128});
    up.redispatch(kCuda, out, s.narrow, s.pattern, s.lambda, s.gamma, s.scale);
    s.same(out, s.narrow.to(at::kDouble).mm(s.update()), "up, unaligned");
  }
}

void no_tokens() {
  static const auto gradients = find<decltype(randlora::hadamard_gradients)>("randlora::hadamard_gradients");
  const Layer s({8, 8, 64, 128, 8, 0}, at::kFloat, at::kFloat);
  const auto [dl, dg] = gradients.redispatch(kCuda, s.narrow, s.wide, {}, {}, s.pattern, s.lambda, s.gamma, s.scale);
  CHECK_THAT(dl.eq(0).all().item<bool>() && dg.eq(0).all().item<bool>(), "gradients of no tokens");
}

}  // namespace

void test_hadamard() {
  at::manual_seed(0);  // errors are compared with a bound on what is likely
  check::run("hadamard: shapes", shapes);
  check::run("hadamard: many tokens, long transforms", long_ones);
  check::run("hadamard: too long", too_long);
  check::run("hadamard: unaligned", unaligned);
  check::run("hadamard: no tokens", no_tokens);
}
