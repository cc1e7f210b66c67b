// Gradients of lambda and gamma from that of the update, for ternary bases as planes: a block of the gradient's rows
// stays in cache while every k unpacks its n columns of B and multiplies them with the rows in nz(k).
#include <algorithm>
#include <tuple>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "cpu/packed_tile.h"
#include "cpu/vec.h"
#include "dtypes.h"
#include "packed_update.h"
#include "sizes.h"

namespace randlora::cpu {
namespace {

// Rows j of a task, and columns o that are worked on at a time.
constexpr int64_t kGatherBlock = 64, kGatherTile = 512;

// t[u][w] += the product of g[u] and b[w] over a tile.
template <class Acc, int Bytes, int J, int I>
RANDLORA_INLINE void products(Acc (&t)[J][I], const Acc* const* g, const Acc* b) {
  constexpr int L = kLanes<Acc, Bytes>;
  using Vector = Vec<Acc, Bytes>;
  Vector sums[J][I] = {};
  for (int64_t o = 0; o < kGatherTile; o += L) {
    Vector values[I];
#pragma GCC unroll 8
    for (int w = 0; w < I; ++w) values[w] = load_bits<Vector>(b + w * kGatherTile + o);
#pragma GCC unroll 8
    for (int u = 0; u < J; ++u) {
      const Vector row = load_bits<Vector>(g[u] + o);
#pragma GCC unroll 8
      for (int w = 0; w < I; ++w) sums[u][w] += row * values[w];
    }
  }
  for (int u = 0; u < J; ++u)
    for (int w = 0; w < I; ++w) t[u][w] = sum<Acc, Bytes>(sums[u][w]);
}

// One block of rows j of the gradient; its share of dlambda goes to partial [r, n].
template <class Acc>
struct Block {
  const PackedPattern& s;
  const Acc *lambda, *gamma;  // [r, n]; this block's columns of gamma, transposed [block, n]
  Acc scale;
  Acc *partial, *dgamma;  // [r, n]; [block, n]
  Acc *b, *rows;          // [n, kGatherTile]; this block's rows of a tile of the gradient [block, kGatherTile]
  int64_t begin;
};

template <class Acc, int J, int I, int Bytes>
struct GatherBlock {
  static RANDLORA_INLINE void run(const Block<Acc>& block, const Acc* grad, int64_t end) {
    const PackedPattern& s = block.s;
    for (int64_t o = 0; o < s.M; o += kGatherTile) {
      const int64_t width = std::min(kGatherTile, s.M - o);
      for (int64_t row = block.begin; row < end; ++row) {
        Acc* const to = block.rows + (row - block.begin) * kGatherTile;
        std::copy_n(grad + row * s.M + o, width, to);
        std::fill_n(to + width, kGatherTile - width, Acc(0));
      }
      for (int64_t k = 0; k < s.r; ++k) {
        const int32_t *e = first_entry(s, k, block.begin), *const last = first_entry(s, k, end);
        if (e == last) continue;
        unpack_tile<kGatherTile>(block.b, s, k, o);
        for (; e + J <= last; e += J) entries<J>(block, k, e);
        for (; e < last; ++e) entries<1>(block, k, e);
      }
    }
  }

  template <int Count>
  static RANDLORA_INLINE void entries(const Block<Acc>& block, int64_t k, const int32_t* e) {
    const int64_t n = block.s.n;
    const Acc* g[Count];
    for (int u = 0; u < Count; ++u) g[u] = block.rows + ((e[u] >> 1) - block.begin) * kGatherTile;
    int64_t i = 0;
    for (; i + I <= n; i += I) reduce<Count, I>(block, k, i, e, g);
    for (; i < n; ++i) reduce<Count, 1>(block, k, i, e, g);
  }

  template <int Count, int Bases>
  static RANDLORA_INLINE void reduce(const Block<Acc>& block, int64_t k, int64_t i, const int32_t* e,
                                     const Acc* const* g) {
    const int64_t n = block.s.n;
    Acc t[Count][Bases];
    products<Acc, Bytes>(t, g, block.b + i * kGatherTile);
    for (int u = 0; u < Count; ++u) {
      const int64_t at = ((e[u] >> 1) - block.begin) * n + i;
      const Acc a = e[u] & 1 ? -block.scale : block.scale;
      for (int w = 0; w < Bases; ++w) {
        block.dgamma[at + w] += a * t[u][w] * block.lambda[k * n + i + w];
        block.partial[k * n + i + w] += a * t[u][w] * block.gamma[at + w];
      }
    }
  }
};

template <class Acc>
void gather(const at::Tensor& grad, const PackedPattern& s, const at::Tensor& lambda, const at::Tensor& gamma,
            double scale, const at::Tensor& partial, const at::Tensor& dgamma) {
  const Acc *grad_data = grad.const_data_ptr<Acc>(), *lambda_data = lambda.const_data_ptr<Acc>(),
            *gamma_data = gamma.const_data_ptr<Acc>();
  Acc *const partial_data = partial.mutable_data_ptr<Acc>(), *const dgamma_data = dgamma.mutable_data_ptr<Acc>();
  at::parallel_for(0, partial.size(0), 1, [&](int64_t first, int64_t last) {
    std::vector<Acc> b(s.n * kGatherTile), rows(kGatherBlock * kGatherTile), gamma_block(kGatherBlock * s.n),
        dgamma_block(kGatherBlock * s.n);
    for (int64_t block = first; block < last; ++block) {
      const int64_t j = block * kGatherBlock, end = std::min(s.m, j + kGatherBlock);
      for (int64_t i = 0; i < s.n; ++i)
        for (int64_t c = j; c < end; ++c) gamma_block[(c - j) * s.n + i] = gamma_data[i * s.m + c];
      std::fill(dgamma_block.begin(), dgamma_block.end(), Acc(0));
      const Block<Acc> work{s,
                            lambda_data,
                            gamma_block.data(),
                            Acc(scale),
                            partial_data + block * s.r * s.n,
                            dgamma_block.data(),
                            b.data(),
                            rows.data(),
                            j};
      run_fitted<GatherBlock<Acc, 4, 6, 64>, GatherBlock<Acc, 4, 3, 32>, GatherBlock<Acc, 4, 3, 16>>(work, grad_data,
                                                                                                     end);
      for (int64_t i = 0; i < s.n; ++i)
        for (int64_t c = j; c < end; ++c) dgamma_data[i * s.m + c] = dgamma_block[(c - j) * s.n + i];
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> gather_packed(const at::Tensor& grad, const PackedPattern& s,
                                                 const at::Tensor& lambda, const at::Tensor& gamma, double scale) {
  const at::Tensor partial = at::zeros({divide_up(s.m, kGatherBlock), s.r, s.n}, grad.options());
  const at::Tensor dgamma = at::zeros({s.n, s.m}, grad.options());
  with_sum_type(grad.scalar_type(), [&](auto number) {
    gather<decltype(number)>(grad, s, lambda, gamma, scale, partial, dgamma);
  });
  return {partial.sum(0), dgamma};
}

}  // namespace randlora::cpu
