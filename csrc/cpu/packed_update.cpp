// Updates of ternary bases as planes on the CPU: for a block of rows j and a tile of o, every k unpacks its n columns
// of B into cache and multiplies them with the coefficients of the rows in nz(k), which stay in registers meanwhile.
#include "packed_update.h"

#include <algorithm>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "cpu/large.h"
#include "cpu/unpack.h"
#include "cpu/vec.h"

namespace randlora::cpu {
namespace {

// Rows j of a task, at most, and columns o that are worked on at a time: 256 KB of the update and n KB of B, in L2.
constexpr int64_t kBuildBlock = 256, kGatherBlock = 64;
constexpr int64_t kBuildTile = 256, kGatherTile = 512;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The entries of row k with j in [begin, end).
RANDLORA_INLINE const int32_t* first_entry(const PackedPattern& s, int64_t k, int64_t j) {
  return std::lower_bound(s.a_entries + s.a_starts[k], s.a_entries + s.a_starts[k + 1], int32_t(2 * j));
}

// Columns p = k n + i of B2, i < n, rows [o, o + width) to [n, kTile]; zeros behind row M. o and kTile: multiples
// of 16.
template <int64_t kTile, class Acc>
RANDLORA_INLINE void unpack_tile(Acc* to, const PackedPattern& s, int64_t k, int64_t o) {
  const int64_t words = std::min(kTile, s.M - o + 15) / 16;
  const uint32_t last = (s.M - o) % 16 && words * 16 > s.M - o ? (1u << ((s.M - o) % 16)) - 1 : 0xffffu;
  for (int64_t i = 0; i < s.n; ++i, to += kTile) {
    const uint16_t* const plus = reinterpret_cast<const uint16_t*>(s.b_planes) + (k * s.n + i) * 2 * s.words + o / 16;
    const uint16_t* const minus = plus + s.words;
    for (int64_t w = 0; w + 1 < words; ++w) unpack16(to + 16 * w, plus[w], minus[w]);
    unpack16(to + 16 * (words - 1), plus[words - 1] & last, minus[words - 1] & last);
    std::fill_n(to + 16 * words, kTile - 16 * words, Acc(0));
  }
}

// rows[u][0 .. V vectors) += sum_i coefficient[u][i] * b[i][0 .. V vectors), u < J.
template <class Acc, int J, int V>
RANDLORA_INLINE void multiply(Acc* const* rows, const Acc* b, const Acc* coefficients, int64_t n) {
  constexpr int L = kLanes<Acc>;
  Vec<Acc> sums[J][V];
#pragma GCC unroll 8
  for (int u = 0; u < J; ++u)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[u][v] = load(rows[u] + v * L);
  for (int64_t i = 0; i < n; ++i) {
    Vec<Acc> values[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) values[v] = load(b + i * kBuildTile + v * L);
#pragma GCC unroll 8
    for (int u = 0; u < J; ++u) {
      const Acc c = coefficients[u * n + i];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[u][v] += values[v] * c;
    }
  }
#pragma GCC unroll 8
  for (int u = 0; u < J; ++u)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(rows[u] + v * L, sums[u][v]);
}

template <class Acc>
struct Scratch {
  std::vector<Acc> update, b, coefficients;  // [block, kBuildTile], [n, kBuildTile], [entries of the block, n]

  Scratch(const PackedPattern& s, int64_t block) : update(block * kBuildTile), b(s.n * kBuildTile) {}
};

// One block of rows j, [begin, end): `write(tile's first o, width)` is called with every tile of the update ready.
template <class Acc, int J, int V>
struct BuildBlock {
  template <class Write>
  static RANDLORA_INLINE void run(Scratch<Acc>* scratch, const PackedPattern& s, const Acc* lambda, const Acc* gamma,
                                  Acc scale, int64_t begin, int64_t end, const Write& write) {
    coefficients(scratch, s, lambda, gamma, scale, begin, end);
    for (int64_t o = 0; o < s.M; o += kBuildTile) {
      const int64_t width = std::min(kBuildTile, s.M - o);
      std::fill(scratch->update.begin(), scratch->update.end(), Acc(0));
      const Acc* c = scratch->coefficients.data();
      for (int64_t k = 0; k < s.r; ++k) {
        const int32_t *e = first_entry(s, k, begin), *const last = first_entry(s, k, end);
        if (e == last) continue;
        unpack_tile<kBuildTile>(scratch->b.data(), s, k, o);
        for (; e + J <= last; e += J, c += J * s.n) group<J>(scratch, s, e, c, begin, width);
        for (; e < last; ++e, c += s.n) group<1>(scratch, s, e, c, begin, width);
      }
      write(o, width);
    }
  }

  static RANDLORA_INLINE void coefficients(Scratch<Acc>* scratch, const PackedPattern& s, const Acc* lambda,
                                           const Acc* gamma, Acc scale, int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t k = 0; k < s.r; ++k) count += first_entry(s, k, end) - first_entry(s, k, begin);
    scratch->coefficients.resize(size_t(count * s.n));
    Acc* to = scratch->coefficients.data();
    for (int64_t k = 0; k < s.r; ++k) {
      const int32_t *const first = first_entry(s, k, begin), *const last = first_entry(s, k, end);
      for (int64_t i = 0; i < s.n; ++i)
        for (const int32_t* e = first; e < last; ++e) {
          const Acc value = scale * lambda[k * s.n + i] * gamma[i * s.m + (*e >> 1)];
          to[(e - first) * s.n + i] = *e & 1 ? -value : value;
        }
      to += (last - first) * s.n;
    }
  }

  template <int Count>
  static RANDLORA_INLINE void group(Scratch<Acc>* scratch, const PackedPattern& s, const int32_t* e, const Acc* c,
                                    int64_t begin, int64_t width) {
    constexpr int64_t kStep = V * kLanes<Acc>;
    static_assert(kBuildTile % kStep == 0);
    for (int64_t o = 0; o < width; o += kStep) {
      Acc* rows[Count];
      for (int u = 0; u < Count; ++u) rows[u] = scratch->update.data() + ((e[u] >> 1) - begin) * kBuildTile + o;
      multiply<Acc, Count, V>(rows, scratch->b.data() + o, c, s.n);
    }
  }
};

template <class T>
struct WriteBlock {
  using Acc = acc_t<T>;
  // update [rows, kBuildTile] to out (and + weight) at rows [j, j + rows), columns [o, o + width).
  static RANDLORA_INLINE void run(T* out, int64_t out_row, int64_t out_column, const T* weight, int64_t weight_row,
                                  int64_t weight_column, const Acc* update, int64_t j, int64_t rows, int64_t o,
                                  int64_t width) {
    if (out_column == 1) {
      for (int64_t row = 0; row < rows; ++row) {
        T* const to = out + (j + row) * out_row + o;
        const T* const from = weight ? weight + (j + row) * weight_row + o : nullptr;
        for (int64_t c = 0; c < width; ++c) to[c] = T(update[row * kBuildTile + c] + (from ? Acc(from[c]) : Acc(0)));
      }
    } else {
      for (int64_t c = 0; c < width; ++c) {
        T* const to = out + (o + c) * out_column + j;
        const T* const from = weight ? weight + (o + c) * weight_column + j : nullptr;
        for (int64_t row = 0; row < rows; ++row)
          to[row] = T(update[row * kBuildTile + c] + (from ? Acc(from[row]) : Acc(0)));
      }
    }
  }
};

template <class T, int J, int V>
void build(const at::Tensor& out, const std::optional<at::Tensor>& weight, const PackedPattern& s,
           const at::Tensor& lambda, const at::Tensor& gamma, double scale) {
  using Acc = acc_t<T>;
  T* const out_data = advise_large(out).mutable_data_ptr<T>();
  const T* const weight_data = weight.has_value() ? weight->const_data_ptr<T>() : nullptr;
  const int64_t weight_row = weight.has_value() ? weight->stride(0) : 0,
                weight_column = weight.has_value() ? weight->stride(1) : 0;
  const Acc *lambda_data = lambda.const_data_ptr<Acc>(), *gamma_data = gamma.const_data_ptr<Acc>();
  // Unpacking B is shared by the rows of a block; every core should have some blocks.
  const int64_t size = std::clamp<int64_t>(divide_up(s.m, 2 * at::get_num_threads()), 32, kBuildBlock);
  at::parallel_for(0, divide_up(s.m, size), 1, [&](int64_t first, int64_t last) {
    Scratch<Acc> scratch(s, size);
    for (int64_t block = first; block < last; ++block) {
      const int64_t j = block * size, rows = std::min(size, s.m - j);
      const auto write = [&](int64_t o, int64_t width) {
        cpu::run<WriteBlock<T>>(out_data, out.stride(0), out.stride(1), weight_data, weight_row, weight_column,
                                static_cast<const Acc*>(scratch.update.data()), j, rows, o, width);
      };
      Scratch<Acc>* const pointer = &scratch;
      cpu::run<BuildBlock<Acc, J, V>>(pointer, s, lambda_data, gamma_data, Acc(scale), j, j + rows, write);
    }
  });
}

// t[u][w] += the product of g[u] and b[w] over a tile.
template <class Acc, int J, int I>
RANDLORA_INLINE void products(Acc (&t)[J][I], const Acc* const* g, const Acc* b) {
  constexpr int L = kLanes<Acc>;
  Vec<Acc> sums[J][I] = {};
  for (int64_t o = 0; o < kGatherTile; o += L) {
    Vec<Acc> values[I];
#pragma GCC unroll 8
    for (int w = 0; w < I; ++w) values[w] = load(b + w * kGatherTile + o);
#pragma GCC unroll 8
    for (int u = 0; u < J; ++u) {
      const Vec<Acc> row = load(g[u] + o);
#pragma GCC unroll 8
      for (int w = 0; w < I; ++w) sums[u][w] += row * values[w];
    }
  }
  for (int u = 0; u < J; ++u)
    for (int w = 0; w < I; ++w) t[u][w] = sum(sums[u][w]);
}

// One block of rows j of the gradient; its share of dlambda goes to partial [r, n].
template <class Acc, int J, int I>
struct GatherBlock {
  const PackedPattern& s;
  const Acc *lambda, *gamma;  // [r, n]; this block's columns of gamma, transposed [block, n]
  Acc scale;
  Acc *partial, *dgamma;  // [r, n]; [block, n]
  Acc *b, *rows;          // [n, kGatherTile]; this block's rows of a tile of the gradient [block, kGatherTile]
  int64_t begin;

  static RANDLORA_INLINE void run(const GatherBlock& block, const Acc* grad, int64_t end) {
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
        for (; e + J <= last; e += J) block.template entries<J>(k, e);
        for (; e < last; ++e) block.template entries<1>(k, e);
      }
    }
  }

  template <int Count>
  RANDLORA_INLINE void entries(int64_t k, const int32_t* e) const {
    const Acc* g[Count];
    for (int u = 0; u < Count; ++u) g[u] = rows + ((e[u] >> 1) - begin) * kGatherTile;
    int64_t i = 0;
    for (; i + I <= s.n; i += I) reduce<Count, I>(k, i, e, g);
    for (; i < s.n; ++i) reduce<Count, 1>(k, i, e, g);
  }

  template <int Count, int Bases>
  RANDLORA_INLINE void reduce(int64_t k, int64_t i, const int32_t* e, const Acc* const* g) const {
    Acc t[Count][Bases];
    products<Acc, Count, Bases>(t, g, b + i * kGatherTile);
    for (int u = 0; u < Count; ++u) {
      const int64_t at = ((e[u] >> 1) - begin) * s.n + i;
      const Acc a = e[u] & 1 ? -scale : scale;
      for (int w = 0; w < Bases; ++w) {
        dgamma[at + w] += a * t[u][w] * lambda[k * s.n + i + w];
        partial[k * s.n + i + w] += a * t[u][w] * gamma[at + w];
      }
    }
  }
};

template <class Acc, int J, int I>
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
      const GatherBlock<Acc, J, I> work{s,
                                        lambda_data,
                                        gamma_block.data(),
                                        Acc(scale),
                                        partial_data + block * s.r * s.n,
                                        dgamma_block.data(),
                                        b.data(),
                                        rows.data(),
                                        j};
      cpu::run<GatherBlock<Acc, J, I>>(work, grad_data, end);
      for (int64_t i = 0; i < s.n; ++i)
        for (int64_t c = j; c < end; ++c) dgamma_data[i * s.m + c] = dgamma_block[(c - j) * s.n + i];
    }
  });
}

}  // namespace

void build_packed(const at::Tensor& out, const std::optional<at::Tensor>& weight, const PackedPattern& s,
                  const at::Tensor& lambda, const at::Tensor& gamma, double scale) {
  // As many sums as there are registers: 24 of 32 with AVX-512, 8 of 16 (four of two each) otherwise.
  const bool many = isa() == Isa::avx512;
  const auto go = [&](auto t) {
    using T = decltype(t);
    if (many)
      build<T, 6, 4>(out, weight, s, lambda, gamma, scale);
    else
      build<T, 4, 1>(out, weight, s, lambda, gamma, scale);
  };
  switch (out.scalar_type()) {
    case at::kDouble: return go(double{});
    case at::kFloat: return go(float{});
    case at::kBFloat16: return go(c10::BFloat16{});
    default: return go(c10::Half{});
  }
}

std::tuple<at::Tensor, at::Tensor> gather_packed(const at::Tensor& grad, const PackedPattern& s,
                                                 const at::Tensor& lambda, const at::Tensor& gamma, double scale) {
  const at::Tensor partial = at::zeros({divide_up(s.m, kGatherBlock), s.r, s.n}, grad.options());
  const at::Tensor dgamma = at::zeros({s.n, s.m}, grad.options());
  const bool many = isa() == Isa::avx512;
  if (grad.scalar_type() == at::kDouble) {
    many ? gather<double, 4, 6>(grad, s, lambda, gamma, scale, partial, dgamma)
         : gather<double, 2, 2>(grad, s, lambda, gamma, scale, partial, dgamma);
  } else {
    many ? gather<float, 4, 6>(grad, s, lambda, gamma, scale, partial, dgamma)
         : gather<float, 2, 2>(grad, s, lambda, gamma, scale, partial, dgamma);
  }
  return {partial.sum(0), dgamma};
}

}  // namespace randlora::cpu
