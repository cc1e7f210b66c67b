// Sums of the parameters' gradients over groups of tokens: their number depends on sizes alone, so that results do not
// depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include <ATen/Parallel.h>

#include "cpu/hadamard_layer.h"
#include "cpu/vec.h"

namespace randlora::cpu {

// to [n, m] = a * (the sum of `groups` times [R, columns, bases])^T, at bases [i, i + width).
template <class Acc>
struct WriteGamma {
  static RANDLORA_INLINE void run(Acc* to, const Acc* sums, int64_t groups, const Acc* a, const HadamardShape& s,
                                  int64_t bases, int64_t i, int64_t width) {
    constexpr int L = kLanes<Acc>;
    for (int64_t j = 0; j < s.m; j += L) {
      const int64_t count = std::min<int64_t>(L, s.m - j);
      alignas(64) Acc block[L * L] = {}, turned[L * L];
      for (int64_t l = 0; l < count; ++l) {
        const int64_t piece = (j + l) / s.width, g = piece % s.R, c = piece / s.R * s.width + (j + l) % s.width;
        const Acc* from = sums + (g * s.columns + c) * bases + i;
        Vec<Acc> sum = load(from);
        __builtin_prefetch(from + bases * s.columns * (L / s.width));
        for (int64_t group = 1; group < groups; ++group) {
          sum += load(from += s.R * s.columns * bases);
          __builtin_prefetch(from + bases * s.columns * (L / s.width));
        }
        store(block + l * L, sum * a[j + l]);
      }
      transpose(turned, block);
      for (int64_t l = 0; l < width; ++l)
        if (count == L)
          store(to + (i + l) * s.m + j, load(turned + l * L));
        else
          store_some(to + (i + l) * s.m + j, load(turned + l * L), count);
    }
  }
};

// to [r, n] = scale * c * the sum of `groups` times [r, bases].
template <class Acc>
void write_lambda(Acc* to, const Acc* sums, int64_t groups, const HadamardLayer<Acc>& layer) {
  const HadamardShape& s = layer.s;
  for (int64_t k = 0; k < s.r; ++k)
    for (int64_t i = 0; i < s.n; ++i) {
      Acc sum = 0;
      for (int64_t group = 0; group < groups; ++group) sum += sums[(group * s.r + k) * layer.bases + i];
      to[k * s.n + i] = layer.scale * layer.c.data()[k * s.n + i] * sum;
    }
}

template <class Acc>
struct HadamardSums {
  // How many bytes the sums may take, unless two groups or the tokens themselves take more.
  static constexpr int64_t kBytes = int64_t{4} << 20;

  const HadamardLayer<Acc>& layer;
  const int64_t dlambda_size, dgamma_size, groups;
  const Buffer<Acc> dlambda, dgamma;  // [groups, r, bases], [groups, R, columns, bases]

  HadamardSums(const HadamardLayer<Acc>& layer, int64_t tokens, int64_t tiles)
      : layer(layer),
        dlambda_size(layer.s.r * layer.bases),
        dgamma_size(layer.s.R * layer.s.columns * layer.bases),
        groups(std::min(tiles, std::clamp<int64_t>(
                                   std::max(kBytes / int64_t(sizeof(Acc)), tokens * layer.s.m) / dgamma_size, 2, 16))),
        dlambda(groups * dlambda_size),
        dgamma(groups * dgamma_size) {}

  Acc* dlambda_of(int64_t group) const { return dlambda.data() + group * dlambda_size; }
  Acc* dgamma_of(int64_t group) const { return dgamma.data() + group * dgamma_size; }

  // dlambda [r, n] with scale and c, dgamma [n, m] with a.
  void write(Acc* dlambda_to, Acc* dgamma_to) const {
    write_lambda(dlambda_to, static_cast<const Acc*>(dlambda.data()), groups, layer);
    const HadamardShape& s = layer.s;
    constexpr int64_t L = kLanes<Acc>;
    at::parallel_for(0, divide_up(s.n, L), divide_up(1 << 15, s.m * L), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * L; i < std::min(s.n, end * L); i += L)
        cpu::run<WriteGamma<Acc>>(dgamma_to, static_cast<const Acc*>(dgamma.data()), groups,
                                  static_cast<const Acc*>(layer.a.data()), s, layer.bases, i, std::min(L, s.n - i));
    });
  }
};

}  // namespace randlora::cpu
