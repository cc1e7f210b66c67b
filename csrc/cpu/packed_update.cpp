// Updates of ternary bases as planes on the CPU: for a block of rows j and a tile of o, every k unpacks its n columns
// of B into cache and multiplies them with the coefficients of the rows in nz(k), which stay in registers meanwhile.
#include <algorithm>
#include <vector>

#include <ATen/Parallel.h>

#include "cpu/large.h"
#include "cpu/packed_tile.h"
#include "cpu/vec.h"
#include "dtypes.h"
#include "packed_update.h"
#include "sizes.h"

namespace randlora::cpu {
namespace {

// Rows j of a task, at most, and columns o that are worked on at a time: 256 KB of the update and n KB of B, in L2.
constexpr int64_t kBuildBlock = 256, kBuildTile = 256;

// rows[u][0 .. V vectors) += sum_i coefficient[u][i] * b[i][0 .. V vectors), u < J.
template <class Acc, int J, int V, int Bytes>
RANDLORA_INLINE void multiply(Acc* const* rows, const Acc* b, const Acc* coefficients, int64_t n) {
  constexpr int L = kLanes<Acc, Bytes>;
  using Vector = Vec<Acc, Bytes>;
  Vector sums[J][V];
#pragma GCC unroll 8
  for (int u = 0; u < J; ++u)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[u][v] = load_bits<Vector>(rows[u] + v * L);
  for (int64_t i = 0; i < n; ++i) {
    Vector values[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) values[v] = load_bits<Vector>(b + i * kBuildTile + v * L);
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
    for (int v = 0; v < V; ++v) store_bits(rows[u] + v * L, sums[u][v]);
}

template <class Acc>
struct Scratch {
  std::vector<Acc> update, b, coefficients;  // [block, kBuildTile], [n, kBuildTile], [entries of the block, n]

  Scratch(const PackedPattern& s, int64_t block) : update(block * kBuildTile), b(s.n * kBuildTile) {}
};

// One block of rows j, [begin, end): `write(tile's first o, width)` is called with every tile of the update ready.
template <class Acc, int J, int V, int Bytes>
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
    constexpr int64_t kStep = V * kLanes<Acc, Bytes>;
    static_assert(kBuildTile % kStep == 0);
    for (int64_t o = 0; o < width; o += kStep) {
      Acc* rows[Count];
      for (int u = 0; u < Count; ++u) rows[u] = scratch->update.data() + ((e[u] >> 1) - begin) * kBuildTile + o;
      multiply<Acc, Count, V, Bytes>(rows, scratch->b.data() + o, c, s.n);
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
    // Of one row, both strides of the result are 1, and the weight's need not be.
    if (weight ? weight_column == 1 : out_column == 1) {
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

template <class T>
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
      // As many sums as registers have room for beside what is added to them: 24 of 32, and 12 of 16.
      run_fitted<BuildBlock<Acc, 6, 4, 64>, BuildBlock<Acc, 6, 2, 32>, BuildBlock<Acc, 6, 2, 16>>(
          pointer, s, lambda_data, gamma_data, Acc(scale), j, j + rows, write);
    }
  });
}

}  // namespace

void build_packed(const at::Tensor& out, const std::optional<at::Tensor>& weight, const PackedPattern& s,
                  const at::Tensor& lambda, const at::Tensor& gamma, double scale) {
  with_float_type(out.scalar_type(), [&](auto type) {
    build<decltype(type)>(out, weight, s, lambda, gamma, scale);
  });
}

}  // namespace randlora::cpu
