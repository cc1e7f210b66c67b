// Up and down for a few tokens, as in decoding: gamma is read once, row by row as it lies there.
#pragma once

#include <algorithm>
#include <cstdint>

#include <ATen/Parallel.h>

#include "cpu/hadamard_layer.h"
#include "cpu/hadamard_tokens.h"
#include "cpu/hadamard_transform.h"

namespace randlora::cpu {

// Tokens up to which it is faster than bringing gamma into the order of groups.
constexpr int64_t kFew = 8;

// How many lanes the sums of one base have: w R, rounded up to whole vectors.
template <class Acc>
int64_t few_row(const HadamardShape& s) {
  return round_up(s.width * s.R, kLanes<Acc>);
}

// u[t, g, i] of bases [i, i + width), for x [tokens, m] with a. Column j counts to lane j mod (w R), and the w lanes of
// a group are added when there are as many bases as lanes. `sums` [tokens, kLanes, few_row] is work memory; what is
// not written there must be zero.
template <class Acc>
struct UpOfBases {
  static RANDLORA_INLINE void run(Acc* u, int64_t token, const Acc* gamma, const Acc* x, int64_t tokens, Acc* sums,
                                  const HadamardShape& s, int64_t bases, int64_t row, int64_t i, int64_t width) {
    constexpr int L = kLanes<Acc>;
    int64_t l = 0;
    for (; l + 4 <= width; l += 4)
      for (int64_t t = 0; t < tokens; ++t)
        add_lanes<4>(sums + (t * L + l) * row, row, gamma + (i + l) * s.m, x + t * s.m, s);
    for (; l < width; ++l)
      for (int64_t t = 0; t < tokens; ++t)
        add_lanes<1>(sums + (t * L + l) * row, row, gamma + (i + l) * s.m, x + t * s.m, s);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t first = 0; first < s.width * s.R; first += L) {
        alignas(64) Acc block[L * L], turned[L * L];
        for (int l = 0; l < L; ++l) store(block + l * L, load(sums + (t * L + l) * row + first));
        transpose(turned, block);
        for (int64_t l = first; l < std::min(first + L, s.width * s.R); ++l) {
          Acc* const to = u + t * token + l / s.width * bases + i;
          const Vec<Acc> value = load(turned + (l - first) * L);
          store(to, l % s.width == 0 ? value : load(to) + value);
        }
      }
  }

  // Several bases at once, so that x is loaded only once for all of them.
  template <int Bases>
  static RANDLORA_INLINE void add_lanes(Acc* sums, int64_t row, const Acc* gamma, const Acc* x,
                                        const HadamardShape& s) {
    constexpr int L = kLanes<Acc>, kVectors = 4;
    const int64_t period = s.width * s.R, whole = s.m / period * period;
    int64_t l = 0;
    for (; l + kVectors * L <= period; l += kVectors * L) {
      Vec<Acc> sum[Bases][kVectors] = {};
      for (int64_t j = l; j < whole; j += period)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const Vec<Acc> value = load(x + j + v * L);
#pragma GCC unroll 4
          for (int b = 0; b < Bases; ++b) {
            sum[b][v] += load(gamma + b * s.m + j + v * L) * value;
          }
        }
#pragma GCC unroll 4
      for (int b = 0; b < Bases; ++b)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(sums + b * row + l + v * L, sum[b][v]);
    }
    for (int b = 0; b < Bases; ++b, gamma += s.m, sums += row) {
      for (int64_t lane = l; lane < period; ++lane) {
        sums[lane] = 0;
        for (int64_t j = lane; j < whole; j += period) sums[lane] += gamma[j] * x[j];
      }
      for (int64_t j = whole; j < s.m; ++j) sums[j - whole] += gamma[j] * x[j];
    }
  }
};

// y[t, j] += gamma[i, j] du[t, g, i] for j in [begin, end) and bases [i, i + width); begin is a multiple of w R.
// `spread` [kLanes, few_row] is work memory for what each lane is multiplied with.
template <class Acc>
struct DownOfBases {
  static RANDLORA_INLINE void run(Acc* y, const Acc* gamma, const Acc* du, int64_t token, int64_t tokens, Acc* spread,
                                  const HadamardShape& s, int64_t bases, int64_t row, int64_t i, int64_t width,
                                  int64_t begin, int64_t end) {
    constexpr int L = kLanes<Acc>;
    const int64_t period = s.width * s.R;
    for (int64_t t = 0; t < tokens; ++t, y += s.m, du += token) {
      for (int64_t first = 0; first < period; first += L) {
        alignas(64) Acc block[L * L] = {}, turned[L * L];
        for (int64_t l = first; l < std::min(first + L, period); ++l)
          store(block + (l - first) * L, load(du + l / s.width * bases + i));
        transpose(turned, block);
        for (int l = 0; l < L; ++l) store(spread + l * row + first, load(turned + l * L));
      }
      int64_t l = 0;
      for (; l + 4 <= width; l += 4)
        for (int64_t first = begin; first < end; first += period)
          add_products<4>(y + first, gamma + (i + l) * s.m + first, spread + l * row, std::min(period, end - first),
                          s.m, row);
      for (; l < width; ++l)
        for (int64_t first = begin; first < end; first += period)
          add_products<1>(y + first, gamma + (i + l) * s.m + first, spread + l * row, std::min(period, end - first),
                          s.m, row);
    }
  }

  // Several bases at once, so that y is loaded and stored only once for all of them.
  template <int Bases>
  static RANDLORA_INLINE void add_products(Acc* y, const Acc* gamma, const Acc* spread, int64_t count, int64_t m,
                                           int64_t row) {
    constexpr int L = kLanes<Acc>;
    int64_t x = 0;
    for (; x + L <= count; x += L) {
      Vec<Acc> sum = load(y + x);
#pragma GCC unroll 4
      for (int l = 0; l < Bases; ++l) {
        sum += load(gamma + l * m + x) * load(spread + l * row + x);
      }
      store(y + x, sum);
    }
    for (; x < count; ++x)
      for (int l = 0; l < Bases; ++l) y[x] += gamma[l * m + x] * spread[l * row + x];
  }
};

// to = from * a
template <class T>
struct Signed {
  static RANDLORA_INLINE void run(acc_t<T>* to, const T* from, const acc_t<T>* a, int64_t count) {
    for (int64_t x = 0; x < count; ++x) to[x] = acc_t<T>(from[x]) * a[x];
  }
};

// to += from * a
template <class T>
struct AddSigned {
  static RANDLORA_INLINE void run(T* to, const acc_t<T>* from, const acc_t<T>* a, int64_t count) {
    for (int64_t x = 0; x < count; ++x) to[x] = T(acc_t<T>(to[x]) + from[x] * a[x]);
  }
};

template <class T, class Acc>
void up_few(const HadamardLayer<Acc>& layer, T* y, const T* x, int64_t tokens) {
  const HadamardShape& s = layer.s;
  const Buffer<Acc> narrow(tokens * s.m), hidden(tokens * layer.hidden_row()), wide(layer.hidden);
  for (int64_t t = 0; t < tokens; ++t)
    cpu::run<Signed<T>>(narrow.data() + t * s.m, x + t * s.m, static_cast<const Acc*>(layer.a.data()), s.m);
  constexpr int64_t L = kLanes<Acc>;
  at::parallel_for(0, divide_up(s.n, L), divide_up(1 << 15, s.m * L), [&](int64_t begin, int64_t end) {
    const Buffer<Acc> sums(tokens * L * few_row<Acc>(s));
    std::fill_n(sums.data(), tokens * L * few_row<Acc>(s), Acc(0));
    for (int64_t i = begin * L; i < std::min(s.n, end * L); i += L) {
      // The last bases may be fewer than the lanes: what the others are multiplied with is zero.
      if (i + L > s.n) std::fill_n(sums.data(), tokens * L * few_row<Acc>(s), Acc(0));
      cpu::run<UpOfBases<Acc>>(hidden.data(), layer.hidden_row(), layer.gamma, static_cast<const Acc*>(narrow.data()),
                               tokens, sums.data(), s, layer.bases, few_row<Acc>(s), i, std::min(L, s.n - i));
    }
  });
  for (int64_t t = 0; t < tokens; ++t) {
    Acc* const v = hidden.data() + t * layer.hidden_row();
    transform_rows(v, s.R, layer.bases);
    cpu::run<ScaleHidden<Acc>>(wide.data(), static_cast<const Acc*>(v), static_cast<const Acc*>(layer.lambda.data()), s,
                               layer.bases, layer.length);
    transform_vector(wide.data(), layer.length);
    cpu::run<AddWide<T>>(y + t * s.M, static_cast<const Acc*>(wide.data()), static_cast<const Acc*>(layer.b.data()),
                         s.M, layer.length);
  }
}

template <class T, class Acc>
void down_few(const HadamardLayer<Acc>& layer, T* y, const T* x, int64_t tokens) {
  const HadamardShape& s = layer.s;
  const Buffer<Acc> narrow(tokens * s.m), hidden(tokens * layer.hidden_row()), wide(layer.hidden);
  std::fill_n(wide.data(), layer.hidden, Acc(0));
  std::fill_n(narrow.data(), tokens * s.m, Acc(0));
  for (int64_t t = 0; t < tokens; ++t) {
    Acc* const du = hidden.data() + t * layer.hidden_row();
    cpu::run<ReadWide<T>>(wide.data(), x + t * s.M, static_cast<const Acc*>(layer.b.data()), s.M, layer.length);
    transform_vector(wide.data(), layer.length);
    cpu::run<UnscaleHidden<Acc>>(du, wide.data(), static_cast<const Acc*>(layer.lambda.data()), s, layer.bases,
                                 layer.length);
    transform_rows(du, s.R, layer.bases);
  }
  const int64_t period = s.width * s.R;
  at::parallel_for(0, divide_up(s.m, period), divide_up(1 << 15, s.n * period), [&](int64_t begin, int64_t end) {
    constexpr int64_t L = kLanes<Acc>;
    const Buffer<Acc> spread(L * few_row<Acc>(s));
    for (int64_t i = 0; i < s.n; i += L)
      cpu::run<DownOfBases<Acc>>(narrow.data(), layer.gamma, static_cast<const Acc*>(hidden.data()), layer.hidden_row(),
                                 tokens, spread.data(), s, layer.bases, few_row<Acc>(s), i, std::min(L, s.n - i),
                                 begin * period, std::min(s.m, end * period));
  });
  for (int64_t t = 0; t < tokens; ++t)
    cpu::run<AddSigned<T>>(y + t * s.m, static_cast<const Acc*>(narrow.data()) + t * s.m,
                           static_cast<const Acc*>(layer.a.data()), s.m);
}

}  // namespace randlora::cpu
