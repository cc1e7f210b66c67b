// A tile of tokens, transposed, and the steps of sparse_products.cpp on it. Each step is a kernel by itself
// (cpu/isa.h): compiling every combination of them as one kernel would take minutes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/sparse_column.h"
#include "cpu/vec.h"
#include "sizes.h"
#include "sparse_update.h"

namespace randlora::cpu {

// One feature of a tile of tokens, in two vectors of 32 bytes. Where registers are not wider than that, compilers keep
// sums in wider vectors on the stack; where they are, wider loads would not make what is in L2 come faster.
template <class Acc>
struct Row {
  typedef Acc Half __attribute__((vector_size(32)));
  Half low = {}, high = {};

  static RANDLORA_INLINE Row load(const Acc* p) {
    Row row;
    row.low = load_bits<Half>(p);
    row.high = load_bits<Half>(p + kLanes<Acc> / 2);
    return row;
  }
  RANDLORA_INLINE void store(Acc* p) const {
    store_bits(p, low);
    store_bits(p + kLanes<Acc> / 2, high);
  }
  RANDLORA_INLINE void operator+=(const Row& other) {
    low += other.low;
    high += other.high;
  }
  RANDLORA_INLINE void operator-=(const Row& other) {
    low -= other.low;
    high -= other.high;
  }
  // *this += other * factor
  RANDLORA_INLINE void add_product(const Row& other, Acc factor) {
    low += other.low * factor;
    high += other.high * factor;
  }
};

// The coefficients of one call. In them and in h, the n bases of every k are padded to `padded`, a multiple of the
// lanes, so that blocks of h can be transposed.
template <class Acc>
struct Scaled {
  const SparsePattern& s;
  int64_t padded;
  std::vector<Acc> coefficients;  // [entries of A, padded], of C, in the order of a_entries

  int64_t entries() const { return s.a_starts[s.count]; }

  // lambda [r, n] and gamma transposed, [m, n].
  Scaled(const SparsePattern& s, const Acc* lambda, const Acc* gamma, Acc scale)
      : s(s), padded(divide_up(s.n, kLanes<Acc>) * kLanes<Acc>), coefficients(entries() * padded) {
    for (int64_t c = 0; c < s.count; ++c)
      for (int32_t e = s.a_starts[c]; e < s.a_starts[c + 1]; ++e) {
        const Acc a = s.a_entries[e] & 1 ? -scale : scale;
        const Acc* const l = lambda + int64_t(s.a_entries[e] >> 1) * s.n;
        const Acc* const g = gamma + int64_t(s.columns[c]) * s.n;
        for (int64_t i = 0; i < s.n; ++i) coefficients[e * padded + i] = a * l[i] * g[i];
      }
  }
};

// Work memory of a thread; a row is one feature of a tile of tokens.
template <class Acc>
struct Scratch {
  std::vector<Acc> small, large, h;  // [m, lanes], [M, lanes], [r * padded, lanes]

  explicit Scratch(const Scaled<Acc>& c)
      : small(c.s.m * kLanes<Acc>), large(c.s.M * kLanes<Acc>), h(c.s.r * c.padded * kLanes<Acc>) {}
};

// A tile of tokens [<= lanes, width] of row-major memory.
template <class T>
struct Tokens {
  T* data;
  int64_t width, count;

  Tokens at(int64_t tile) const {
    constexpr int64_t L = kLanes<acc_t<T>>;
    return {data + tile * L * width, width, std::min(L, count - tile * L)};
  }
};

// ---- the steps ----

// to [width, lanes]; zeros for tokens that are not there.
template <class T>
struct Read {
  using Acc = acc_t<T>;
  static RANDLORA_INLINE void run(Acc* to, const Tokens<T>& tokens) {
    constexpr int L = kLanes<Acc>;
    Acc block[L * L] = {};
    int64_t f = 0;
    for (; f + L <= tokens.width; f += L) {
      for (int64_t row = 0; row < tokens.count; ++row)
        store(block + row * L, load(tokens.data + row * tokens.width + f));
      transpose(to + f * L, block);
    }
    for (; f < tokens.width; ++f)
      for (int64_t row = 0; row < L; ++row)
        to[f * L + row] = row < tokens.count ? Acc(tokens.data[row * tokens.width + f]) : Acc(0);
  }
};

// tokens += from [width, lanes]
template <class T>
struct Add {
  using Acc = acc_t<T>;
  static RANDLORA_INLINE void run(const Tokens<T>& tokens, const Acc* from) {
    constexpr int L = kLanes<Acc>;
    Acc block[L * L];
    int64_t f = 0;
    for (; f + L <= tokens.width; f += L) {
      transpose(block, from + f * L);
      for (int64_t row = 0; row < tokens.count; ++row) {
        T* const to = tokens.data + row * tokens.width + f;
        store(to, load(to) + load(block + row * L));
      }
    }
    for (; f < tokens.width; ++f)
      for (int64_t row = 0; row < tokens.count; ++row) {
        T* const to = tokens.data + row * tokens.width + f;
        *to = T(Acc(*to) + from[f * L + row]);
      }
  }
};

// h = small C^T
template <class Acc>
struct SmallToH {
  static RANDLORA_INLINE void run(Scratch<Acc>* scratch, const Scaled<Acc>& c) {
    constexpr int L = kLanes<Acc>;
    std::fill(scratch->h.begin(), scratch->h.end(), Acc(0));
    for (int64_t column = 0; column < c.s.count; ++column) {
      const Row<Acc> feature = Row<Acc>::load(scratch->small.data() + c.s.columns[column] * L);
      for (int32_t e = c.s.a_starts[column]; e < c.s.a_starts[column + 1]; ++e) {
        Acc* const h = scratch->h.data() + (c.s.a_entries[e] >> 1) * c.padded * L;
        const Acc* const coefficients = c.coefficients.data() + e * c.padded;
        for (int64_t i = 0; i < c.s.n; ++i) {
          Row<Acc> row = Row<Acc>::load(h + i * L);
          row.add_product(feature, coefficients[i]);
          row.store(h + i * L);
        }
      }
    }
  }
};

// small = h C, for the columns of C that are not zero.
template <class Acc>
struct HToSmall {
  static RANDLORA_INLINE void run(Scratch<Acc>* scratch, const Scaled<Acc>& c) {
    constexpr int L = kLanes<Acc>;
    for (int64_t column = 0; column < c.s.count; ++column) {
      Row<Acc> even, odd;  // two sums, so that an addition need not wait for the one before it
      for (int32_t e = c.s.a_starts[column]; e < c.s.a_starts[column + 1]; ++e) {
        const Acc* const h = scratch->h.data() + (c.s.a_entries[e] >> 1) * c.padded * L;
        const Acc* const coefficients = c.coefficients.data() + e * c.padded;
        int64_t i = 0;
        for (; i + 2 <= c.s.n; i += 2) {
          even.add_product(Row<Acc>::load(h + i * L), coefficients[i]);
          odd.add_product(Row<Acc>::load(h + (i + 1) * L), coefficients[i + 1]);
        }
        if (i < c.s.n) even.add_product(Row<Acc>::load(h + i * L), coefficients[i]);
      }
      even += odd;
      even.store(scratch->small.data() + c.s.columns[column] * L);
    }
  }
};

// large = h B2^T
template <class Acc, class Index>
struct HToLarge {
  static RANDLORA_INLINE void run(Scratch<Acc>* scratch, const Scaled<Acc>& c) {
    constexpr int L = kLanes<Acc>;
    Acc* const large = scratch->large.data();
    std::fill(scratch->large.begin(), scratch->large.end(), Acc(0));
    for (int64_t k = 0; k < c.s.r; ++k)
      for (int64_t i = 0; i < c.s.n; ++i) {
        const Row<Acc> h = Row<Acc>::load(scratch->h.data() + (k * c.padded + i) * L);
        const Column<Index> b(c.s, k * c.s.n + i);
        for (const Index* o = b.plus; o < b.plus_end; ++o) {
          Acc* const to = large + int64_t(*o) * L;
          Row<Acc> row = Row<Acc>::load(to);
          row += h;
          row.store(to);
        }
        for (const Index* o = b.minus; o < b.minus_end; ++o) {
          Acc* const to = large + int64_t(*o) * L;
          Row<Acc> row = Row<Acc>::load(to);
          row -= h;
          row.store(to);
        }
      }
  }
};

// h = large B2
template <class Acc, class Index>
struct LargeToH {
  static RANDLORA_INLINE void run(Scratch<Acc>* scratch, const Scaled<Acc>& c) {
    constexpr int L = kLanes<Acc>;
    const Acc* const large = scratch->large.data();
    for (int64_t k = 0; k < c.s.r; ++k)
      for (int64_t i = 0; i < c.s.n; ++i) {
        Row<Acc> plus, minus;
        const Column<Index> b(c.s, k * c.s.n + i);
        for (const Index* o = b.plus; o < b.plus_end; ++o) plus += Row<Acc>::load(large + int64_t(*o) * L);
        for (const Index* o = b.minus; o < b.minus_end; ++o) minus += Row<Acc>::load(large + int64_t(*o) * L);
        plus -= minus;
        plus.store(scratch->h.data() + (k * c.padded + i) * L);
      }
  }
};

// t [entries, padded] += h^T small where C is not zero. Blocks of h are transposed in place, so that a vector
// holds `lanes` bases i of one token, and no sum runs across lanes.
template <class Acc>
struct AddGradient {
  static RANDLORA_INLINE void run(Acc* t, Scratch<Acc>* scratch, const Scaled<Acc>& c) {
    constexpr int L = kLanes<Acc>;
    for (int64_t first = 0; first < c.s.r * c.padded; first += L) {
      Acc block[L * L];
      std::copy_n(scratch->h.data() + first * L, L * L, block);
      transpose(scratch->h.data() + first * L, block);
    }
    for (int64_t column = 0; column < c.s.count; ++column) {
      const Acc* const feature = scratch->small.data() + c.s.columns[column] * L;
      for (int32_t e = c.s.a_starts[column]; e < c.s.a_starts[column + 1]; ++e) {
        const Acc* const h = scratch->h.data() + (c.s.a_entries[e] >> 1) * c.padded * L;
        for (int64_t i = 0; i < c.padded; i += L) {
          Acc* const to = t + e * c.padded + i;
          Row<Acc> even = Row<Acc>::load(to), odd;
          for (int token = 0; token < L; token += 2) {
            even.add_product(Row<Acc>::load(h + (i + token) * L), feature[token]);
            odd.add_product(Row<Acc>::load(h + (i + token + 1) * L), feature[token + 1]);
          }
          even += odd;
          even.store(to);
        }
      }
    }
  }
};

}  // namespace randlora::cpu
