// dW of Hadamard bases on the CPU, and the parameters' gradients from its gradient: one transform for each row j of D,
// whose v has the numbers of column j of gamma in every row k, with the signs of k's column of the short transform.
#include <algorithm>
#include <optional>
#include <tuple>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/hadamard_layer.h"
#include "cpu/hadamard_sums.h"
#include "cpu/hadamard_tokens.h"
#include "cpu/hadamard_transform.h"
#include "cpu/large.h"
#include "hadamard.h"
#include "ops.h"
#include "parameter_gradients.h"

namespace randlora::cpu {
namespace {

// (-1)^popcount(k & g)
RANDLORA_INLINE bool is_minus(int64_t k, int64_t g) { return __builtin_parityll(uint64_t(k & g)); }

// to [L, bases] = rows of gamma^T with a, zeros in the padding.
template <class Acc>
struct ReadColumns {
  static RANDLORA_INLINE void run(Acc* to, const Acc* gamma, const Acc* a, const HadamardShape& s, int64_t bases,
                                  int64_t j, int64_t count) {
    constexpr int L = kLanes<Acc>;
    for (int64_t i = 0; i < bases; i += L) {
      alignas(64) Acc block[L * L] = {}, turned[L * L];
      for (int64_t l = 0; l < std::min<int64_t>(L, s.n - i); ++l)
        for (int64_t x = 0; x < count; ++x) block[l * L + x] = a[j + x] * gamma[(i + l) * s.m + j + x];
      transpose(turned, block);
      for (int64_t x = 0; x < count; ++x) store(to + x * bases + i, load(turned + x * L));
    }
  }
};

// h of a row of D, from a column of gamma.
template <class Acc>
struct HiddenOfColumn {
  static RANDLORA_INLINE void run(Acc* h, const Acc* column, const Acc* lambda, const HadamardShape& s, int64_t bases,
                                  int64_t length, int64_t g) {
    constexpr int L = kLanes<Acc>;
    for (int64_t k = 0; k < s.r; ++k) {
      const Acc sign = is_minus(k, g) ? Acc(-1) : Acc(1);
      for (int64_t i = 0; i < bases; i += L)
        store(h + k * s.n + i, load(column + i) * load(lambda + k * bases + i) * sign);
    }
    if (s.P < length) std::fill(h + s.P, h + length, Acc(0));
    for (int64_t p = length; p < s.P; ++p) h[p % length] += h[p];
  }
};

// dgamma [bases] without a = sum_k lambda z, dlambda [r, bases] += column z, with the signs of group g.
template <class Acc>
struct GradientsOfColumn {
  static RANDLORA_INLINE void run(Acc* dgamma, Acc* dlambda, Acc* z, const Acc* column, const Acc* lambda,
                                  const HadamardShape& s, int64_t bases, int64_t length, int64_t g) {
    constexpr int L = kLanes<Acc>;
    for (int64_t p = length; p < s.P; ++p) z[p] = z[p - length];
    std::fill(dgamma, dgamma + bases, Acc(0));
    for (int64_t k = 0; k < s.r; ++k) {
      const Acc sign = is_minus(k, g) ? Acc(-1) : Acc(1);
      for (int64_t i = 0; i < bases; i += L) {
        const Vec<Acc> value = load(z + k * s.n + i) * sign;
        store(dgamma + i, load(dgamma + i) + value * load(lambda + k * bases + i));
        store(dlambda + k * bases + i, load(dlambda + k * bases + i) + value * load(column + i));
      }
    }
  }
};

// Rows [j, j + count) of `out`, whose rows are contiguous: b * sums, and the weight's.
template <class T>
struct WriteRow {
  using Acc = acc_t<T>;
  static RANDLORA_INLINE void run(T* to, const T* weight, const Acc* sums, const Acc* b, int64_t M, int64_t length) {
    constexpr int L = kLanes<Acc>;
    for (int64_t first = 0; first < M; first += length) {
      const int64_t count = std::min(length, M - first);
      int64_t x = 0;
      for (; x + L <= count; x += L) {
        const Vec<Acc> value = load(b + first + x) * load(sums + x);
        store(to + first + x, weight ? load(weight + first + x) + value : value);
      }
      for (; x < count; ++x) to[first + x] = T((weight ? Acc(weight[first + x]) : Acc(0)) + b[first + x] * sums[x]);
    }
  }
};

// The same rows where columns are contiguous; sums [kLanes, length].
template <class T>
struct WriteColumns {
  using Acc = acc_t<T>;
  static RANDLORA_INLINE void run(T* to, int64_t to_column, const T* weight, int64_t weight_column, const Acc* sums,
                                  const Acc* b, int64_t M, int64_t length, int64_t hidden, int64_t count) {
    constexpr int L = kLanes<Acc>;
    for (int64_t o = 0; o < M; o += L) {
      alignas(64) Acc block[L * L], turned[L * L];
      for (int64_t l = 0; l < L; ++l) store(block + l * L, load(sums + l * hidden + o % length));
      transpose(turned, block);
      for (int64_t x = 0; x < std::min<int64_t>(L, M - o); ++x) {
        const Vec<Acc> value = load(turned + x * L) * b[o + x];
        T* const place = to + (o + x) * to_column;
        const T* const old = weight + (o + x) * weight_column;
        if (count == L)
          store(place, load(old) + value);
        else
          store_some(place, load_some(old, count) + value, count);
      }
    }
  }
};

template <class T>
void build(const at::Tensor& out, const std::optional<at::Tensor>& weight, const HadamardLayer<acc_t<T>>& layer) {
  using Acc = acc_t<T>;
  constexpr int64_t L = kLanes<Acc>;
  const HadamardShape& s = layer.s;
  T* const to = advise_large(out).mutable_data_ptr<T>();
  const T* const from = weight.has_value() ? weight->const_data_ptr<T>() : nullptr;
  const Acc *const lambda = layer.lambda.data(), *const a = layer.a.data(), *const b = layer.b.data();
  // Of one row or column, both strides of the result are 1, and the weight's need not be.
  const bool rows = !from || weight->stride(1) == 1;
  at::parallel_for(0, divide_up(s.m, L), 1, [&](int64_t begin, int64_t end) {
    const Buffer<Acc> columns(L * layer.bases), sums((rows ? 1 : L) * layer.hidden);
    if (!rows) std::fill_n(sums.data(), L * layer.hidden, Acc(0));
    for (int64_t j = begin * L; j < std::min(s.m, end * L); j += L) {
      const int64_t count = std::min(L, s.m - j);
      cpu::run<ReadColumns<Acc>>(columns.data(), layer.gamma, a, s, layer.bases, j, count);
      for (int64_t l = 0; l < count; ++l) {
        Acc* const h = sums.data() + (rows ? 0 : l * layer.hidden);
        cpu::run<HiddenOfColumn<Acc>>(h, static_cast<const Acc*>(columns.data()) + l * layer.bases, lambda, s,
                                      layer.bases, layer.length, (j + l) / s.width % s.R);
        transform_vector(h, layer.length);
        if (rows)
          cpu::run<WriteRow<T>>(to + (j + l) * out.stride(0), from ? from + (j + l) * weight->stride(0) : nullptr,
                                static_cast<const Acc*>(h), b, s.M, layer.length);
      }
      if (!rows)
        cpu::run<WriteColumns<T>>(to + j, out.stride(1), from + j, weight->stride(1),
                                  static_cast<const Acc*>(sums.data()), b, s.M, layer.length, layer.hidden, count);
    }
  });
}

at::Tensor update(at::TensorList pattern, const at::Tensor& lambda, const at::Tensor& gamma, int64_t max_dim,
                  double scale, const std::optional<at::Tensor>& weight, at::ScalarType dtype) {
  const SkipAutogradAndAutocast guard;
  const HadamardShape s = check_hadamard(pattern, lambda, gamma, max_dim);
  const at::Tensor out = make_hadamard_update(s, weight, gamma, dtype);
  with_layer(dtype, s, lambda, gamma, scale, [&](auto type, const auto& layer) {
    build<decltype(type)>(out, weight, layer);
  });
  return out;
}

template <class Acc>
void gather(const at::Tensor& dlambda, const at::Tensor& dgamma, const at::Tensor& grad,
            const HadamardLayer<Acc>& layer) {
  constexpr int64_t L = kLanes<Acc>;
  const HadamardShape& s = layer.s;
  const Acc *const from = grad.const_data_ptr<Acc>(), *const lambda = layer.lambda.data(), *const a = layer.a.data(),
                   *const b = layer.b.data();
  Acc* const dgamma_to = dgamma.mutable_data_ptr<Acc>();
  const int64_t blocks = divide_up(s.m, L), groups = std::min<int64_t>(blocks, 16);
  const Buffer<Acc> sums(groups * s.r * layer.bases);
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const Buffer<Acc> columns(L * layer.bases), z(layer.hidden), rows(L * layer.bases);
    std::fill_n(z.data(), layer.hidden, Acc(0));
    for (int64_t group = begin; group < end; ++group) {
      Acc* const sum = sums.data() + group * s.r * layer.bases;
      std::fill_n(sum, s.r * layer.bases, Acc(0));
      for (int64_t j = group * blocks / groups * L; j < std::min(s.m, (group + 1) * blocks / groups * L); j += L) {
        const int64_t count = std::min(L, s.m - j);
        cpu::run<ReadColumns<Acc>>(columns.data(), layer.gamma, a, s, layer.bases, j, count);
        for (int64_t l = 0; l < count; ++l) {
          cpu::run<ReadWide<Acc>>(z.data(), from + (j + l) * s.M, b, s.M, layer.length);
          transform_vector(z.data(), layer.length);
          cpu::run<GradientsOfColumn<Acc>>(rows.data() + l * layer.bases, sum, z.data(),
                                           static_cast<const Acc*>(columns.data()) + l * layer.bases, lambda, s,
                                           layer.bases, layer.length, (j + l) / s.width % s.R);
        }
        for (int64_t i = 0; i < s.n; ++i)
          for (int64_t l = 0; l < count; ++l) dgamma_to[i * s.m + j + l] = a[j + l] * rows.data()[l * layer.bases + i];
      }
    }
  });
  write_lambda(dlambda.mutable_data_ptr<Acc>(), static_cast<const Acc*>(sums.data()), groups, layer);
}

std::tuple<at::Tensor, at::Tensor> update_backward(const at::Tensor& grad, at::TensorList pattern,
                                                   const at::Tensor& lambda, const at::Tensor& gamma, double scale,
                                                   bool need_lambda, bool need_gamma) {
  const SkipAutogradAndAutocast guard;
  const HadamardShape s = check_hadamard_grad(grad, pattern, lambda, gamma);
  const at::Tensor rows = grad.contiguous();
  const at::Tensor dlambda = at::empty({s.r, s.n}, grad.options()), dgamma = at::empty({s.n, s.m}, grad.options());
  with_layer(grad.scalar_type(), s, lambda, gamma, scale, [&](auto, const auto& layer) {
    gather(dlambda, dgamma, rows, layer);
  });
  return parameter_gradients(dlambda, dgamma, lambda, gamma, need_lambda, need_gamma);
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, CPU, m) {
  m.impl("hadamard_update", &update);
  m.impl("hadamard_update_backward", &update_backward);
}

}  // namespace randlora::cpu
