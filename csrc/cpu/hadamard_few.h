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
constexpr int64_t kFew = 4;

// u[t, g, i] of one base i, for x [tokens, m] with a; `sums` [w R] is room.
template <class Acc>
struct UpOfBase {
  static RANDLORA_INLINE void run(Acc* u, int64_t token, const Acc* gamma, const Acc* x, int64_t tokens, Acc* sums,
                                  const HadamardShape& s, int64_t bases) {
    constexpr int L = kLanes<Acc>;
    const int64_t period = s.width * s.R, whole = s.m / period * period;
    for (int64_t t = 0; t < tokens; ++t, x += s.m, u += token) {
      int64_t l = 0;
      for (; l + 4 * L <= period; l += 4 * L) {
        Vec<Acc> sum[4] = {};
        for (int64_t j = l; j < whole; j += period)
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) sum[v] += load(gamma + j + v * L) * load(x + j + v * L);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) store(sums + l + v * L, sum[v]);
      }
      for (; l < period; ++l) {
        Acc sum = 0;
        for (int64_t j = l; j < whole; j += period) sum += gamma[j] * x[j];
        sums[l] = sum;
      }
      for (int64_t j = whole; j < s.m; ++j) sums[j - whole] += gamma[j] * x[j];
      for (int64_t g = 0; g < s.R; ++g) {
        Acc sum = 0;
        for (int64_t e = 0; e < s.width; ++e) sum += sums[g * s.width + e];
        u[g * bases] = sum;
      }
    }
  }
};

// y[t, j] += gamma[i, j] du[t, g, i] for j in [begin, end) and one base i; `spread` [w R] is room. begin is a multiple
// of w R.
template <class Acc>
struct DownOfBase {
  static RANDLORA_INLINE void run(Acc* y, const Acc* gamma, const Acc* du, int64_t token, int64_t tokens, Acc* spread,
                                  const HadamardShape& s, int64_t bases, int64_t begin, int64_t end) {
    const int64_t period = s.width * s.R;
    for (int64_t t = 0; t < tokens; ++t, y += s.m, du += token) {
      for (int64_t g = 0; g < s.R; ++g)
        for (int64_t e = 0; e < s.width; ++e) spread[g * s.width + e] = du[g * bases];
      for (int64_t first = begin; first < end; first += period) {
        const int64_t count = std::min(period, end - first);
        for (int64_t l = 0; l < count; ++l) y[first + l] += gamma[first + l] * spread[l];
      }
    }
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
  if (layer.bases != s.n) std::fill_n(hidden.data(), tokens * layer.hidden_row(), Acc(0));
  at::parallel_for(0, s.n, divide_up(1 << 15, s.m), [&](int64_t begin, int64_t end) {
    const Buffer<Acc> sums(s.width * s.R);
    for (int64_t i = begin; i < end; ++i)
      cpu::run<UpOfBase<Acc>>(hidden.data() + i, layer.hidden_row(), layer.gamma + i * s.m,
                              static_cast<const Acc*>(narrow.data()), tokens, sums.data(), s, layer.bases);
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
    const Buffer<Acc> spread(period);
    for (int64_t i = 0; i < s.n; ++i)
      cpu::run<DownOfBase<Acc>>(narrow.data(), layer.gamma + i * s.m, static_cast<const Acc*>(hidden.data()) + i,
                                layer.hidden_row(), tokens, spread.data(), s, layer.bases, begin * period,
                                std::min(s.m, end * period));
  });
  for (int64_t t = 0; t < tokens; ++t)
    cpu::run<AddSigned<T>>(y + t * s.m, static_cast<const Acc*>(narrow.data()) + t * s.m,
                           static_cast<const Acc*>(layer.a.data()), s.m);
}

}  // namespace randlora::cpu
