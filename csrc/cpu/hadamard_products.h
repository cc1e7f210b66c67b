// The small products of hadamard.h: blocks of the result stay in registers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/vec.h"

namespace randlora::cpu {

// c [rows, width] = a [rows, depth] b [depth, width], or added to c. width is a multiple of kLanes<Acc>.
template <class Acc>
struct Product {
  Acc* c;
  int64_t c_row;
  const Acc* a;
  int64_t a_row, a_depth;
  const Acc* b;
  int64_t b_depth;
  int64_t rows, depth, width;
  bool add;
};

template <class Acc, int Rows, int Vectors, int Bytes>
RANDLORA_INLINE void multiply_block(const Product<Acc>& p, int64_t row, int64_t x) {
  constexpr int L = kLanes<Acc, Bytes>;
  using V = Vec<Acc, Bytes>;
  Acc* const c = p.c + row * p.c_row + x;
  const Acc *a = p.a + row * p.a_row, *b = p.b + x;
  V sums[Rows][Vectors];
#pragma GCC unroll 8
  for (int u = 0; u < Rows; ++u)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sums[u][v] = p.add ? load_bits<V>(c + u * p.c_row + v * L) : V{};
  for (int64_t k = 0; k < p.depth; ++k, a += p.a_depth, b += p.b_depth) {
    V values[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) values[v] = load_bits<V>(b + v * L);
#pragma GCC unroll 8
    for (int u = 0; u < Rows; ++u) {
      const Acc factor = a[u * p.a_row];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[u][v] += values[v] * factor;
    }
  }
#pragma GCC unroll 8
  for (int u = 0; u < Rows; ++u)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store_bits(c + u * p.c_row + v * L, sums[u][v]);
}

template <class Acc, int Rows, int Vectors, int Bytes>
struct Multiply {
  static RANDLORA_INLINE void run(const Product<Acc>& p) {
    constexpr int L = kLanes<Acc, Bytes>;
    int64_t x = 0;
    for (; x + Vectors * L <= p.width; x += Vectors * L) columns<Vectors>(p, x);
    if constexpr (Vectors > 1)
      for (; x < p.width; x += L) columns<1>(p, x);
  }

  template <int Count>
  static RANDLORA_INLINE void columns(const Product<Acc>& p, int64_t x) {
    int64_t row = 0;
    for (; row + Rows <= p.rows; row += Rows) multiply_block<Acc, Rows, Count, Bytes>(p, row, x);
    if (row + Rows / 2 <= p.rows) {
      multiply_block<Acc, Rows / 2, Count, Bytes>(p, row, x);
      row += Rows / 2;
    }
    for (; row < p.rows; ++row) multiply_block<Acc, 1, Count, Bytes>(p, row, x);
  }
};

// As many sums as registers have room for beside what is added to them.
template <class Acc>
void multiply(const Product<Acc>& p) {
  run_fitted<Multiply<Acc, 8, 2, 64>, Multiply<Acc, 6, 2, 32>, Multiply<Acc, 4, 2, 16>>(p);
}

// The right factor of a product is kept in panels of this many columns, [panels][depth][kPanel], so that a panel's rows
// lie side by side. The last panel has the columns that are left.
template <class Acc>
inline constexpr int64_t kPanel = 2 * kLanes<Acc>;

// c [rows, width] = a [rows, depth] b, b in panels.
template <class Acc>
void multiply_panels(Acc* c, int64_t c_row, const Acc* a, int64_t a_row, const Acc* b, int64_t rows, int64_t depth,
                     int64_t width) {
  for (int64_t x = 0; x < width; x += kPanel<Acc>) {
    const int64_t columns = std::min(kPanel<Acc>, width - x);
    multiply(Product<Acc>{c + x, c_row, a, a_row, 1, b + x * depth, columns, rows, depth, columns, false});
  }
}

}  // namespace randlora::cpu
