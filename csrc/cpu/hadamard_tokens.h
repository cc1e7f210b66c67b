// The steps for one token that are neither transforms nor products: reading and writing each side, and scaling between
// them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/hadamard_layer.h"
#include "cpu/vec.h"

namespace randlora::cpu {

// While a token is read, the next one, `ahead` elements on, is prefetched: the hardware's own prefetching stops at the
// end of a page.
template <class T>
RANDLORA_INLINE void fetch(const T* p, int64_t ahead) {
  __builtin_prefetch(p + ahead);
}

// to = from
template <class T>
RANDLORA_INLINE void widen(acc_t<T>* to, const T* from, int64_t count) {
  constexpr int L = kLanes<acc_t<T>>;
  int64_t x = 0;
  for (; x + L <= count; x += L) {
    store(to + x, load(from + x));
    fetch(from + x, count);
  }
  for (; x < count; ++x) to[x] = acc_t<T>(from[x]);
}

// to += from
template <class T>
RANDLORA_INLINE void add_to(T* to, const acc_t<T>* from, int64_t count) {
  constexpr int L = kLanes<acc_t<T>>;
  int64_t x = 0;
  for (; x + L <= count; x += L) {
    store(to + x, load(to + x) + load(from + x));
    fetch(to + x, count);
  }
  for (; x < count; ++x) to[x] = T(acc_t<T>(to[x]) + from[x]);
}

// function(position among the groups, column j, count) for one run of neighbouring columns after the other; the last
// count may be 0.
template <int Width, class Function>
RANDLORA_INLINE void for_pieces(const HadamardShape& s, int64_t columns, const Function& function) {
  const int64_t whole = s.m / (Width * s.R);
  int64_t j = 0;
  for (int64_t q = 0; q < whole; ++q)
    for (int64_t g = 0; g < s.R; ++g, j += Width)
      function(g * columns + q * Width, j, std::integral_constant<int, Width>{});
  if (j < s.m)
    for (int64_t g = 0; g < s.R; ++g, j += Width)
      function(g * columns + whole * Width, j, int(std::clamp<int64_t>(s.m - j, 0, Width)));
}

template <class Function>
RANDLORA_INLINE void with_width(int64_t width, const Function& function) {
  switch (width) {
    case 1: return function(std::integral_constant<int, 1>{});
    case 2: return function(std::integral_constant<int, 2>{});
    case 4: return function(std::integral_constant<int, 4>{});
    default: return function(std::integral_constant<int, 8>{});
  }
}

// to [R, columns] = from [m]; `row` [m] is work memory.
template <class T>
struct ReadNarrow {
  using Acc = acc_t<T>;
  static RANDLORA_INLINE void run(Acc* to, const T* from, Acc* row, const HadamardShape& s, int64_t columns) {
    const Acc* x = row;
    if constexpr (std::is_same_v<T, Acc>)
      x = from;
    else
      widen(row, from, s.m);
    with_width(s.width, [&](auto width) {
      for_pieces<width()>(s, columns, [&](int64_t place, int64_t j, auto count) {
        std::memcpy(to + place, x + j, size_t(count) * sizeof(Acc));
        for (int e = count; e < width(); ++e) to[place + e] = Acc(0);
        if constexpr (std::is_same_v<T, Acc>) fetch(x + j, s.m);
      });
    });
  }
};

// to [m] += from [R, columns]
template <class T>
struct AddNarrow {
  using Acc = acc_t<T>;
  static RANDLORA_INLINE void run(T* to, const Acc* from, Acc* row, const HadamardShape& s, int64_t columns) {
    with_width(s.width, [&](auto width) {
      for_pieces<width()>(s, columns, [&](int64_t place, int64_t j, auto count) {
        std::memcpy(row + j, from + place, size_t(count) * sizeof(Acc));
      });
    });
    add_to(to, row, s.m);
  }
};

// to [length] = b * from [M], modulo length.
template <class T>
struct ReadWide {
  using Acc = acc_t<T>;
  static RANDLORA_INLINE void run(Acc* to, const T* from, const Acc* b, int64_t M, int64_t length) {
    constexpr int L = kLanes<Acc>;
    for (int64_t first = 0; first < M; first += length) {
      const int64_t count = std::min(length, M - first);
      int64_t x = 0;
      for (; x + L <= count; x += L) {
        const Vec<Acc> value = load(b + first + x) * load(from + first + x);
        store(to + x, first == 0 ? value : load(to + x) + value);
        fetch(from + first + x, M);
      }
      for (; x < count; ++x) {
        const Acc value = b[first + x] * Acc(from[first + x]);
        to[x] = first == 0 ? value : to[x] + value;
      }
    }
    if (M < length) std::fill(to + M, to + length, Acc(0));
  }
};

// to [M] += b * from, which goes on after `length` as it began.
template <class T>
struct AddWide {
  using Acc = acc_t<T>;
  static RANDLORA_INLINE void run(T* to, const Acc* from, const Acc* b, int64_t M, int64_t length) {
    constexpr int L = kLanes<Acc>;
    for (int64_t first = 0; first < M; first += length) {
      const int64_t count = std::min(length, M - first);
      int64_t x = 0;
      for (; x + L <= count; x += L) store(to + first + x, load(to + first + x) + load(b + first + x) * load(from + x));
      for (; x < count; ++x) to[first + x] = T(Acc(to[first + x]) + b[first + x] * from[x]);
    }
  }
};

// h [length] = lambda * v [r, bases], modulo length. Rows are written whole, each over the padding of the one before.
template <class Acc>
struct ScaleHidden {
  static RANDLORA_INLINE void run(Acc* h, const Acc* v, const Acc* lambda, const HadamardShape& s, int64_t bases,
                                  int64_t length) {
    constexpr int L = kLanes<Acc>;
    for (int64_t k = 0; k < s.r; ++k)
      for (int64_t i = 0; i < bases; i += L)
        store(h + k * s.n + i, load(v + k * bases + i) * load(lambda + k * bases + i));
    if (s.P < length) std::fill(h + s.P, h + length, Acc(0));
    for (int64_t p = length; p < s.P; ++p) h[p % length] += h[p];
  }
};

// du [R, bases] before its transform = lambda * z, z [length] as ReadWide and the transform left it.
template <class Acc>
struct UnscaleHidden {
  static RANDLORA_INLINE void run(Acc* du, Acc* z, const Acc* lambda, const HadamardShape& s, int64_t bases,
                                  int64_t length) {
    constexpr int L = kLanes<Acc>;
    for (int64_t p = length; p < s.P; ++p) z[p] = z[p - length];
    for (int64_t k = 0; k < s.r; ++k)
      for (int64_t i = 0; i < bases; i += L)
        store(du + k * bases + i, load(z + k * s.n + i) * load(lambda + k * bases + i));
    std::fill(du + s.r * bases, du + s.R * bases, Acc(0));
  }
};

// The same, where du is v before: sums [r, bases] += v * z.
template <class Acc>
struct GradientsOfHidden {
  static RANDLORA_INLINE void run(Acc* sums, Acc* du, Acc* z, const Acc* lambda, const HadamardShape& s, int64_t bases,
                                  int64_t length) {
    constexpr int L = kLanes<Acc>;
    for (int64_t p = length; p < s.P; ++p) z[p] = z[p - length];
    for (int64_t k = 0; k < s.r; ++k)
      for (int64_t x = k * bases; x < (k + 1) * bases; x += L) {
        const Vec<Acc> value = load(z + k * (s.n - bases) + x);
        store(sums + x, load(sums + x) + load(du + x) * value);
        store(du + x, value * load(lambda + x));
      }
    std::fill(du + s.r * bases, du + s.R * bases, Acc(0));
  }
};

}  // namespace randlora::cpu
