// Tokens are taken a vector's width at a time and transposed, so that a feature of all of them is one vector: what a
// non-zero of B or C does is then one vector addition, and the tile of tokens stays in L2 meanwhile.
#include "sparse_products.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/sparse_tile.h"
#include "cpu/vec.h"
#include "dtypes.h"
#include "sizes.h"

namespace randlora::cpu {
namespace {

template <class T, class Index>
void up(Scratch<acc_t<T>>* scratch, const Scaled<acc_t<T>>& c, const Tokens<T>& large, const Tokens<T>& small) {
  using Acc = acc_t<T>;
  cpu::run<Read<T>>(scratch->small.data(), small);
  cpu::run<SmallToH<Acc>>(scratch, c);
  cpu::run<HToLarge<Acc, Index>>(scratch, c);
  cpu::run<Add<T>>(large, scratch->large.data());
}

// t, `into.data` and `small.data` may be null, for what is not asked for.
template <class T, class Index>
void down(Scratch<acc_t<T>>* scratch, const Scaled<acc_t<T>>& c, const Tokens<T>& large, const Tokens<T>& small,
          const Tokens<T>& into, acc_t<T>* t) {
  using Acc = acc_t<T>;
  cpu::run<Read<T>>(scratch->large.data(), large);
  cpu::run<LargeToH<Acc, Index>>(scratch, c);
  if (into.data) {
    if (t) std::fill(scratch->small.begin(), scratch->small.end(), Acc(0));
    cpu::run<HToSmall<Acc>>(scratch, c);
    cpu::run<Add<T>>(into, scratch->small.data());
  }
  if (t) {
    cpu::run<Read<T>>(scratch->small.data(), small);
    cpu::run<AddGradient<Acc>>(t, scratch, c);
  }
}

// function(T{}, Index{})
template <class Function>
void with_types(at::ScalarType type, bool short_indices, const Function& function) {
  const auto with_index = [&](auto t) {
    short_indices ? function(t, uint16_t{}) : function(t, int32_t{});
  };
  with_float_type(type, with_index);
}

// lambda [r, n] and gamma transposed, [m, n], in the type that sums have.
struct Parameters {
  at::Tensor lambda, gamma;

  Parameters(const at::Tensor& lambda, const at::Tensor& gamma, at::ScalarType tokens)
      : lambda(lambda.to(sum_type(tokens)).contiguous()), gamma(gamma.to(sum_type(tokens)).t().contiguous()) {}
};

// Data that is written, or read only; null for a tensor that is not there.
template <class T>
Tokens<T> tokens_of(const std::optional<at::Tensor>& t) {
  if (!t.has_value()) return {nullptr, 0, 0};
  return {const_cast<T*>(t->const_data_ptr<T>()), t->size(1), t->size(0)};
}

// The gradients of lambda and gamma where `small` is given, and into += large D^T where `into` is.
std::tuple<at::Tensor, at::Tensor> down(const SparsePattern& s, const std::optional<at::Tensor>& into,
                                        const at::Tensor& large, const std::optional<at::Tensor>& small,
                                        const at::Tensor& lambda, const at::Tensor& gamma, double scale) {
  const Parameters p(lambda, gamma, large.scalar_type());
  const bool gradients = small.has_value();
  const at::Tensor dlambda = at::zeros({gradients ? s.r : 0, s.n}, p.lambda.options());
  const at::Tensor dgamma = at::zeros({gradients ? s.m : 0, s.n}, p.gamma.options());
  with_types(large.scalar_type(), s.short_indices, [&](auto type, auto index) {
    using T = decltype(type);
    using Acc = acc_t<T>;
    const Acc *l = p.lambda.const_data_ptr<Acc>(), *g = p.gamma.const_data_ptr<Acc>();
    const Scaled<Acc> c(s, l, g, Acc(scale));
    const int64_t tiles = divide_up(large.size(0), kLanes<Acc>);
    // Groups of tiles, each with sums of its own, that do not depend on the number of threads.
    const int64_t groups = gradients ? std::clamp<int64_t>(tiles / 4, 1, 16) : tiles;
    const int64_t size = c.entries() * c.padded;
    std::vector<Acc> t(gradients ? groups * size : 0);
    at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      Scratch<Acc> scratch(c);
      for (int64_t group = begin; group < end; ++group) {
        Acc* const sums = gradients ? t.data() + group * size : nullptr;
        for (int64_t tile = group * tiles / groups; tile < (group + 1) * tiles / groups; ++tile)
          down<T, decltype(index)>(&scratch, c, tokens_of<T>(large).at(tile), tokens_of<T>(small).at(tile),
                                   tokens_of<T>(into).at(tile), sums);
      }
    });
    if (!gradients) return;
    for (int64_t group = 1; group < groups; ++group)
      for (int64_t e = 0; e < size; ++e) t[e] += t[group * size + e];
    Acc *const dl = dlambda.mutable_data_ptr<Acc>(), *const dg = dgamma.mutable_data_ptr<Acc>();
    for (int64_t column = 0; column < s.count; ++column)
      for (int32_t e = s.a_starts[column]; e < s.a_starts[column + 1]; ++e) {
        const Acc a = s.a_entries[e] & 1 ? Acc(-scale) : Acc(scale);
        const int64_t k = s.a_entries[e] >> 1, j = s.columns[column];
        for (int64_t i = 0; i < s.n; ++i) {
          const Acc value = a * t[e * c.padded + i];
          dl[k * s.n + i] += value * g[j * s.n + i];
          dg[j * s.n + i] += value * l[k * s.n + i];
        }
      }
  });
  return {dlambda, dgamma.t().contiguous()};
}

void sparse_up_(const at::Tensor& out, const at::Tensor& x, at::TensorList pattern, const at::Tensor& lambda,
                const at::Tensor& gamma, double scale) {
  const SparsePattern s = check_sparse_tokens(x, out, pattern, lambda, gamma);
  const Parameters p(lambda, gamma, x.scalar_type());
  with_types(x.scalar_type(), s.short_indices, [&](auto type, auto index) {
    using T = decltype(type);
    using Acc = acc_t<T>;
    const Scaled<Acc> c(s, p.lambda.const_data_ptr<Acc>(), p.gamma.const_data_ptr<Acc>(), Acc(scale));
    at::parallel_for(0, divide_up(x.size(0), kLanes<Acc>), 1, [&](int64_t begin, int64_t end) {
      Scratch<Acc> scratch(c);
      for (int64_t tile = begin; tile < end; ++tile)
        up<T, decltype(index)>(&scratch, c, tokens_of<T>(out).at(tile), tokens_of<T>(x).at(tile));
    });
  });
}

void sparse_down_(const at::Tensor& out, const at::Tensor& x, at::TensorList pattern, const at::Tensor& lambda,
                  const at::Tensor& gamma, double scale) {
  down(check_sparse_tokens(out, x, pattern, lambda, gamma), out, x, std::nullopt, lambda, gamma, scale);
}

std::tuple<at::Tensor, at::Tensor> sparse_gradients(const at::Tensor& narrow, const at::Tensor& wide,
                                                    const std::optional<at::Tensor>& into_narrow,
                                                    at::TensorList pattern, const at::Tensor& lambda,
                                                    const at::Tensor& gamma, double scale) {
  const SparsePattern s = check_sparse_tokens(narrow, wide, pattern, lambda, gamma);
  if (into_narrow.has_value()) check_tokens_like(*into_narrow, "into_narrow", narrow, s.m);
  return down(s, into_narrow, wide, narrow, lambda, gamma, scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, CPU, m) {
  m.impl("sparse_up_", &sparse_up_);
  m.impl("sparse_down_", &sparse_down_);
  m.impl("sparse_gradients", &sparse_gradients);
}

}  // namespace randlora::cpu
