// Layers with dense bases, and with packed ones (packed_update.h) or a seed (seed.h) that are made dense for the call,
// in groups of rows k of A.
#include <algorithm>

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>

#include "bases.h"
#include "layer/layer.h"
#include "ops.h"
#include "packed_update.h"
#include "seed.h"
#include "sizes.h"

namespace randlora {
namespace {

class DenseLayer final : public Layer {
 public:
  DenseLayer(const LayerArguments& a, Strategy strategy) : Layer(a, strategy), rows_(rows_per_group()) {
    if (a.pattern.empty()) {
      A_ = cut(*a.A, 2, 0, sizes_.m);
      B2_ = cast(cut(cut(*a.B, 0, 0, sizes_.M), 1, 0, sizes_.n), dtype_).flatten(1);
    } else if (is_seed(a.pattern) && rows_ == sizes_.r) {
      std::tie(A_, B2_) = made(0, sizes_.r);  // once, also where a pass goes through the groups twice
    }
  }

 private:
  // Rows [row, row + rows) of A, with the same rows of S2 times n, and columns of B2: by RandLoRA's flattening, rows k
  // of A are rows [k n, ...) of S2 and columns of B2 of the same numbers.
  struct Group {
    int64_t row, rows;
    at::Tensor A, S2, B2;

    at::Tensor of(const at::Tensor& lambda) const { return cut(lambda, 0, row, rows); }
  };

  void add_update(at::Tensor& y, const at::Tensor& x) const override {
    if (strategy_ == Strategy::materialized) return accumulate(y, x, matrix({}).t());
    for_groups([&](const Group& k) {
      accumulate(y, wide_ ? x.mm(k.S2.t()) : x.mm(k.B2), wide_ ? k.B2.t() : k.S2);
    });
  }

  ParameterGradients update_backward(at::Tensor& dx, const at::Tensor& g, const at::Tensor& x,
                                     const Needed& needed) const override {
    const bool factored = strategy_ == Strategy::factored;
    if (needed.x && strategy_ == Strategy::materialized) accumulate(dx, g, matrix({}));
    if (!factored && !needed.parameters()) return {};
    const at::Tensor G = factored ? at::Tensor() : weight_gradient(g, x);
    at::Tensor dlambda, dgamma;
    if (rows_ < sizes_.r) dlambda = at::empty_like(a_.lambda);
    for_groups(
        [&](const Group& k) {
          at::Tensor dS2;
          if (factored) {
            const at::Tensor dh = wide_ ? g.mm(k.B2) : g.mm(k.S2.t());
            if (needed.x) accumulate(dx, dh, wide_ ? k.S2 : k.B2.t());
            if (needed.parameters()) dS2 = wide_ ? mm_accumulated(dh.t(), x) : mm_accumulated(x.mm(k.B2).t(), g);
          } else {
            dS2 = mm_accumulated(k.B2.t(), wide_ ? G : G.t());
          }
          if (!needed.parameters()) return;
          const auto [dl, dg] = unique_base_backward(dS2.view({k.rows, sizes_.n, sizes_.m}), k.A, k.of(a_.lambda),
                                                     a_.gamma, a_.scale, needed.lambda, needed.gamma);
          if (needed.lambda && rows_ < sizes_.r) k.of(dlambda).copy_(dl);
          if (needed.lambda && rows_ == sizes_.r) dlambda = dl;
          if (needed.gamma) dgamma = dgamma.defined() ? dgamma.add_(dg) : dg;
        },
        factored);
    return {dlambda, dgamma};
  }

  at::Tensor matrix(const at::Tensor& weight) const override {
    at::Tensor sum;
    for_groups([&](const Group& k) {
      const at::Tensor left = wide_ ? k.B2 : k.S2.t(), right = wide_ ? k.S2 : k.B2.t();
      if (sum.defined())
        sum.addmm_(left, right);
      else
        sum = weight.defined() ? at::addmm(weight, left, right) : at::mm(left, right);
    });
    return sum;
  }

  // function(group) for one group of rows k of A after the other.
  template <class Function>
  void for_groups(const Function& function, bool need_S2 = true) const {
    for (int64_t row = 0; row < sizes_.r; row += rows_) {
      Group k{row, std::min(rows_, sizes_.r - row), {}, {}, {}};
      if (A_.defined()) {
        k.A = k.of(A_);
        k.B2 = cut(B2_, 1, row * sizes_.n, k.rows * sizes_.n);
      } else if (is_seed(a_.pattern)) {
        std::tie(k.A, k.B2) = made(row, k.rows);
      } else {
        std::tie(k.A, k.B2) = packed_expand(a_.pattern, sizes_.n, sizes_.m, sizes_.M, dtype_, row, k.rows);
        k.B2 = k.B2.t();
      }
      if (need_S2)
        k.S2 = unique_base(k.A, k.of(a_.lambda), a_.gamma, a_.scale, dtype_).view({k.rows * sizes_.n, sizes_.m});
      function(k);
    }
  }

  // Rows k of A in [row, row + rows), and the columns of B2 that they are multiplied with, from the seed: bit for bit
  // those of bases that are kept in the dtype of y.
  std::tuple<at::Tensor, at::Tensor> made(int64_t row, int64_t rows) const {
    const auto [r, n, m, M] = sizes_;
    const int64_t seed = seed_of(a_.pattern), begin = row * n, end = begin + rows * n;
    const int64_t i = begin / r, i_end = divide_up(end, r);  // bases with columns p = i r + k in [begin, end)
    const at::Tensor A = at::empty({rows, 1, m}, a_.x.options().dtype(a_.dtype));
    const at::Tensor B = at::empty({M, i_end - i, r}, A.options());
    fill_bases_(A, seed, int64_t(Stream::A), {row, 0, 0}, std::nullopt);
    fill_bases_(B, seed, int64_t(Stream::B), {0, i, 0}, std::nullopt);
    return {A, cut(cast(B, dtype_).flatten(1), 1, begin - i * r, end - begin)};
  }

  // Rows of a group, so that temporaries stay below the workspace.
  int64_t rows_per_group() const {
    const auto [r, n, m, M] = sizes_;
    const bool packed = !a_.pattern.empty();
    if (a_.workspace == 0) return is_packed(a_.pattern) ? unpacked_rows(r, n, M, dtype_, a_.x.device()) : r;
    // Per row k: n rows of S2 and of its fp32 gradient; factored: n columns of h and of its gradient; of B2 where
    // it is no tensor of the caller's.
    const int64_t element = int64_t(c10::elementSize(dtype_));
    const int64_t hidden = strategy_ == Strategy::factored ? 2 * tokens_ * element : 0;
    const int64_t bytes = n * (m * (element + std::max<int64_t>(4, element)) + hidden + (packed ? M * element : 0));
    return std::clamp<int64_t>(a_.workspace / bytes, 1, r);
  }

  // G = g^T x [out, in], the gradient of dW.
  static at::Tensor weight_gradient(const at::Tensor& g, const at::Tensor& x) {
    // On CUDA 16-bit G keeps the next product on the tensor cores; that product's result, dS2, is fp32.
    return g.is_cuda() ? at::mm(g.t(), x) : mm_accumulated(g.t(), x);
  }

  int64_t rows_;  // of a group
  at::Tensor A_, B2_;
};

}  // namespace

std::unique_ptr<Layer> make_dense_layer(const LayerArguments& a, Strategy strategy) {
  return std::make_unique<DenseLayer>(a, strategy);
}

}  // namespace randlora
