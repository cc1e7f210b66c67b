// One layer's parameters as the kernels of Hadamard bases take them. Features of the narrow side are ordered by groups:
// column j = (q R + g) w + e is column c = q w + e of group g. Every group has room for `columns` columns; those that
// the layer does not have count as zero.
//
// Rows of n bases and of a group's columns are padded to a multiple of the lanes, so that every row begins with a whole
// vector. What is in the padding is never read.
#pragma once

#include <algorithm>
#include <cstdint>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "cpu/hadamard_products.h"
#include "cpu/vec.h"
#include "dtypes.h"
#include "hadamard.h"
#include "sizes.h"

namespace randlora::cpu {

inline int64_t round_up(int64_t a, int64_t to) { return divide_up(a, to) * to; }

// Memory for a thread or a call, not filled, aligned for vectors.
template <class Acc>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : memory_(at::empty({size}, at::TensorOptions().dtype(c10::CppTypeToScalarType<Acc>::value))),
        data_(memory_.mutable_data_ptr<Acc>()) {}
  Acc* data() const { return data_; }

 private:
  at::Tensor memory_;
  Acc* data_;
};

// +1 or -1 for each bit.
template <class Acc>
struct Signs {
  static RANDLORA_INLINE void run(Acc* to, const int32_t* words, int64_t count) {
    for (int64_t x = 0; x < count; x += 32) {
      const uint32_t word = uint32_t(words[x / 32]);
      if (x + 32 <= count)
        for (int bit = 0; bit < 32; ++bit) to[x + bit] = Acc(1) - Acc(2) * Acc(int32_t(word >> bit & 1));
      else
        for (int bit = 0; bit < count - x; ++bit) to[x + bit] = Acc(1) - Acc(2) * Acc(int32_t(word >> bit & 1));
    }
  }
};

// gamma with a, transposed, for u = x gamma^T: [R][panels of bases][columns][kPanel].
template <class Acc>
struct PackUp {
  static RANDLORA_INLINE void run(Acc* to, const Acc* gamma, const Acc* a, const HadamardShape& s, int64_t i,
                                  int64_t width) {
    constexpr int L = kLanes<Acc>;
    const int64_t panel = i / kPanel<Acc>, padded = round_up(s.n, L);
    const int64_t row = std::min(kPanel<Acc>, padded - panel * kPanel<Acc>);
    Acc* const from_here = to + panel * kPanel<Acc> * s.columns + i % kPanel<Acc>;
    for (int64_t j = 0; j < s.m; j += L) {
      const int64_t count = std::min<int64_t>(L, s.m - j);
      alignas(64) Acc block[L * L] = {}, turned[L * L];
      const Vec<Acc> signs = count == L ? load(a + j) : load_some(a + j, count);
      for (int64_t l = 0; l < width; ++l) {
        const Acc* const from = gamma + (i + l) * s.m + j;
        store(block + l * L, signs * (count == L ? load(from) : load_some(from, count)));
      }
      transpose(turned, block);
      for (int64_t l = 0; l < count; ++l) {
        const int64_t piece = (j + l) / s.width, g = piece % s.R, c = piece / s.R * s.width + (j + l) % s.width;
        store(from_here + g * s.columns * padded + c * row, load(turned + l * L));
      }
    }
  }
};

// gamma with a for y = du gamma: [R][panels of columns][n][kPanel], groups `group` elements apart.
template <class Acc>
struct PackDown {
  static RANDLORA_INLINE void run(Acc* to, const Acc* gamma, const Acc* a, const HadamardShape& s, int64_t columns,
                                  int64_t group, int64_t i) {
    const Acc* const from = gamma + i * s.m;
    for (int64_t first = 0, c = 0; first < s.m; c += s.width)
      for (int64_t g = 0; g < s.R && first < s.m; ++g, first += s.width) {
        const int64_t panel = c / kPanel<Acc>, row = std::min(kPanel<Acc>, columns - panel * kPanel<Acc>);
        Acc* const place = to + g * group + panel * kPanel<Acc> * s.n + i * row + c % kPanel<Acc>;
        for (int64_t e = 0; e < std::min(s.width, s.m - first); ++e) place[e] = a[first + e] * from[first + e];
      }
  }
};

template <class Acc>
struct HadamardLayer {
  static constexpr int64_t kLine = kLanes<Acc>;

  const HadamardShape s;
  const int64_t bases, columns;  // n and columns of a group, padded
  const int64_t length;          // of the long transform. W(o, p) knows o and p modulo the shorter side's power of two
  const int64_t hidden;          // room for P numbers, for `length`, and for the padding of the last row
  const Acc* gamma;              // [n, m], as it came
  const Buffer<Acc> lambda;      // [r, bases], with scale and c, zeros in the padding
  const Acc scale;
  const Buffer<Acc> a, b, c;  // [m], [M], [P]

  // Contiguous parameters.
  HadamardLayer(const HadamardShape& s, const Acc* lambda_data, const Acc* gamma, Acc scale)
      : s(s),
        bases(round_up(s.n, kLine)),
        columns(round_up(s.columns, kLine)),
        length(power(std::min(s.M, s.P))),
        hidden(std::max(length, round_up(s.P + bases, kLine))),
        gamma(gamma),
        lambda(s.r * bases),
        scale(scale),
        a(s.m),
        b(s.M),
        c(s.P) {
    cpu::run<Signs<Acc>>(a.data(), s.a, s.m);
    cpu::run<Signs<Acc>>(b.data(), s.b, s.M);
    cpu::run<Signs<Acc>>(c.data(), s.c, s.P);
    for (int64_t k = 0; k < s.r; ++k) {
      Acc* const to = lambda.data() + k * bases;
      for (int64_t i = 0; i < s.n; ++i) to[i] = scale * c.data()[k * s.n + i] * lambda_data[k * s.n + i];
      std::fill(to + s.n, to + bases, Acc(0));
    }
  }

  // How far rows of a tile of tokens are apart: not a power of two, as rows that are fill one set of a cache only.
  int64_t narrow_row() const { return s.R * columns + kLine; }
  int64_t hidden_row() const { return s.R * bases + kLine; }

  Buffer<Acc> pack_up() const {
    const Buffer<Acc> packed(s.R * s.columns * bases);
    if (s.m % (s.width * s.R) != 0) std::fill_n(packed.data(), s.R * s.columns * bases, Acc(0));
    at::parallel_for(0, divide_up(s.n, kLine), divide_up(1 << 15, s.m * kLine), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kLine; i < std::min(s.n, end * kLine); i += kLine)
        cpu::run<PackUp<Acc>>(packed.data(), gamma, static_cast<const Acc*>(a.data()), s, i, std::min(kLine, s.n - i));
    });
    return packed;
  }

  int64_t down_group() const { return s.n * columns + kLine; }

  Buffer<Acc> pack_down() const {
    const Buffer<Acc> packed(s.R * down_group());
    if (columns != s.columns || s.m % (s.width * s.R) != 0) std::fill_n(packed.data(), s.R * down_group(), Acc(0));
    at::parallel_for(0, s.n, divide_up(1 << 15, s.m), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        cpu::run<PackDown<Acc>>(packed.data(), gamma, static_cast<const Acc*>(a.data()), s, columns, down_group(), i);
    });
    return packed;
  }

 private:
  static int64_t power(int64_t at_least) {
    int64_t power = kLine;
    while (power < at_least) power *= 2;
    return power;
  }
};

// function(T{}, layer) for numbers of this type, with the parameters in the type that sums have.
template <class Function>
void with_layer(at::ScalarType type, const HadamardShape& s, const at::Tensor& lambda, const at::Tensor& gamma,
                double scale, const Function& function) {
  const at::Tensor l = lambda.to(sum_type(type)).contiguous(), g = gamma.to(sum_type(type)).contiguous();
  with_float_type(type, [&](auto t) {
    using Acc = acc_t<decltype(t)>;
    function(t, HadamardLayer<Acc>(s, l.const_data_ptr<Acc>(), g.const_data_ptr<Acc>(), Acc(scale)));
  });
}

}  // namespace randlora::cpu
