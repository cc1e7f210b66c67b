// Updates of very sparse bases on the CPU: every non-zero of A walks the index lists of B once. A row of the update
// stays in L1 or L2 while the lists add to it; the result is written, and the weight read, once.
#include "sparse_update.h"
#include "packed_update.h"

#include <algorithm>
#include <memory>
#include <tuple>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/large.h"
#include "cpu/sparse_column.h"
#include "cpu/vec.h"
#include "dtypes.h"
#include "parameter_gradients.h"
#include "sizes.h"

namespace randlora::cpu {
namespace {

constexpr int64_t kGroup = 16;          // rows j built side by side where they are columns of the weight
constexpr int64_t kColumnsPerSum = 64;  // of the backward's partial sums of dlambda

// to[o * stride] += row c of the update.
template <class Acc, class Index>
RANDLORA_INLINE void add_row(Acc* to, int64_t stride, const SparsePattern& s, int64_t c, const Acc* lambda,
                             const Acc* gamma, Acc scale) {
  const int64_t j = s.columns[c];
  for (int32_t e = s.a_starts[c]; e < s.a_starts[c + 1]; ++e) {
    const int64_t k = s.a_entries[e] >> 1;
    const Acc a = s.a_entries[e] & 1 ? -scale : scale;
    for (int64_t i = 0; i < s.n; ++i) {
      const Acc value = a * lambda[k * s.n + i] * gamma[i * s.m + j];
      const Column<Index> b(s, k * s.n + i);
      for (const Index* t = b.plus; t < b.plus_end; ++t) to[int64_t(*t) * stride] += value;
      for (const Index* t = b.minus; t < b.minus_end; ++t) to[int64_t(*t) * stride] -= value;
    }
  }
}

template <class T>
RANDLORA_INLINE void write_row(T* out, const T* weight, const acc_t<T>* row, int64_t count) {
  using Acc = acc_t<T>;
  constexpr int L = kLanes<Acc>;
  int64_t o = 0;
  for (; o + L <= count; o += L) store(out + o, weight ? load(weight + o) + load(row + o) : load(row + o));
  if (o < count) {
    const int64_t rest = count - o;
    const Vec<Acc> value = load_some(row + o, rest);
    store_some(out + o, weight ? load_some(weight + o, rest) + value : value, rest);
  }
}

// Rows of the compact result, or all rows of weight + D where those are contiguous.
template <class T, class Index>
struct BuildRows {
  using Acc = acc_t<T>;
  static RANDLORA_INLINE void run(T* out, const T* weight, int64_t weight_stride, const SparsePattern& s,
                                  const Acc* lambda, const Acc* gamma, Acc scale, Acc* buffer, int64_t begin,
                                  int64_t end) {
    int64_t c = weight ? std::lower_bound(s.columns, s.columns + s.count, int32_t(begin)) - s.columns : begin;
    for (int64_t row = begin; row < end; ++row) {
      std::fill_n(buffer, s.M, Acc(0));
      if (!weight || (c < s.count && s.columns[c] == row)) add_row<Acc, Index>(buffer, 1, s, c++, lambda, gamma, scale);
      write_row(out + row * s.M, weight ? weight + row * weight_stride : nullptr, buffer, s.M);
    }
  }
};

// Columns j in groups of 16 of weight + D where rows j of D are columns of the weight: one cache line per row o.
template <class T, class Index>
struct BuildColumns {
  using Acc = acc_t<T>;
  static RANDLORA_INLINE void run(T* out, const T* weight, int64_t weight_stride, const SparsePattern& s,
                                  const Acc* lambda, const Acc* gamma, Acc scale, Acc* buffer, int64_t begin,
                                  int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t j = group * kGroup, width = std::min(kGroup, s.m - j);
      std::fill_n(buffer, s.M * kGroup, Acc(0));
      int64_t c = std::lower_bound(s.columns, s.columns + s.count, int32_t(j)) - s.columns;
      for (; c < s.count && s.columns[c] < j + width; ++c)
        add_row<Acc, Index>(buffer + (s.columns[c] - j), kGroup, s, c, lambda, gamma, scale);
      for (int64_t o = 0; o < s.M; ++o)
        write_row(out + o * s.m + j, weight + o * weight_stride + j, buffer + o * kGroup, width);
    }
  }
};

template <class T, class Index>
void build(const at::Tensor& out, const std::optional<at::Tensor>& weight, const SparsePattern& s,
           const at::Tensor& lambda, const at::Tensor& gamma, double scale) {
  using Acc = acc_t<T>;
  T* const out_data = advise_large(out).mutable_data_ptr<T>();
  const T* const weight_data = weight.has_value() ? weight->const_data_ptr<T>() : nullptr;
  const Acc *lambda_data = lambda.const_data_ptr<Acc>(), *gamma_data = gamma.const_data_ptr<Acc>();
  const bool columns = weight.has_value() && weight->stride(1) != 1;
  const int64_t stride = !weight.has_value() ? 0 : columns ? weight->stride(1) : weight->stride(0);
  const int64_t tasks = columns ? divide_up(s.m, kGroup) : out.size(0);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Acc[]> buffer(new Acc[s.M * (columns ? kGroup : 1)]);
    if (columns)
      run<BuildColumns<T, Index>>(out_data, weight_data, stride, s, lambda_data, gamma_data, Acc(scale), buffer.get(),
                                  begin, end);
    else
      run<BuildRows<T, Index>>(out_data, weight_data, stride, s, lambda_data, gamma_data, Acc(scale), buffer.get(),
                               begin, end);
  });
}

at::Tensor as(const at::Tensor& t, at::ScalarType type) { return t.to(type).contiguous(); }

at::Tensor sparse_update(at::TensorList pattern, const at::Tensor& lambda, const at::Tensor& gamma, int64_t M,
                         double scale, const std::optional<at::Tensor>& weight, at::ScalarType dtype) {
  if (is_bits(pattern)) return unpacked_update(pattern, lambda, gamma, M, scale, weight, dtype);
  // Sums are as wide as the result: fp64 parameters with an fp32 result are rounded first.
  const at::ScalarType acc = sum_type(dtype);
  if (is_planes(pattern)) {
    const LayerSizes layer = check_parameters(lambda, gamma, M);
    const at::Tensor out = empty_update(layer, layer.m, weight, gamma, dtype);
    build_packed(out, weight, check_packed(pattern, layer, gamma), as(lambda, acc), as(gamma, acc), scale);
    return out;
  }
  const SparsePattern s = check_lists_of_layer(pattern, lambda, gamma, M);
  const at::Tensor out = empty_update(s, s.count, weight, gamma, dtype);
  if (out.numel() == 0) return out;
  const at::Tensor l = as(lambda, acc), g = as(gamma, acc);
  with_float_type(dtype, [&](auto t) {
    using T = decltype(t);
    if (s.short_indices)
      build<T, uint16_t>(out, weight, s, l, g, scale);
    else
      build<T, int32_t>(out, weight, s, l, g, scale);
  });
  return out;
}

// Columns [begin, end) of the backward; partial [r, n] is this group's share of dlambda.
template <class Acc, class Index>
struct GatherColumns {
  static RANDLORA_INLINE void run(const Acc* grad, const SparsePattern& s, const Acc* lambda, const Acc* gamma,
                                  Acc scale, Acc* partial, Acc* dgamma, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Acc* const row = grad + c * s.M;
      const int64_t j = s.columns[c];
      for (int32_t e = s.a_starts[c]; e < s.a_starts[c + 1]; ++e) {
        const int64_t k = s.a_entries[e] >> 1;
        const Acc a = s.a_entries[e] & 1 ? -scale : scale;
        for (int64_t i = 0; i < s.n; ++i) {
          const Column<Index> b(s, k * s.n + i);
          const Acc t = a * (gather(row, b.plus, b.plus_end) - gather(row, b.minus, b.minus_end));
          dgamma[i * s.m + j] += t * lambda[k * s.n + i];
          partial[k * s.n + i] += t * gamma[i * s.m + j];
        }
      }
    }
  }

  // Four sums, so that an addition need not wait for the one before it.
  static RANDLORA_INLINE Acc gather(const Acc* row, const Index* t, const Index* end) {
    Acc sums[4] = {};
    for (; t + 4 <= end; t += 4)
      for (int u = 0; u < 4; ++u) sums[u] += row[t[u]];
    for (; t < end; ++t) sums[0] += row[*t];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
};

template <class Acc>
void backward(const at::Tensor& grad, const SparsePattern& s, const at::Tensor& lambda, const at::Tensor& gamma,
              double scale, const at::Tensor& partial, const at::Tensor& dgamma) {
  const Acc *grad_data = grad.const_data_ptr<Acc>(), *lambda_data = lambda.const_data_ptr<Acc>(),
            *gamma_data = gamma.const_data_ptr<Acc>();
  Acc *const partial_data = partial.mutable_data_ptr<Acc>(), *const dgamma_data = dgamma.mutable_data_ptr<Acc>();
  at::parallel_for(0, partial.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kColumnsPerSum, last = std::min(s.count, first + kColumnsPerSum);
      Acc* const sums = partial_data + group * s.r * s.n;
      if (s.short_indices)
        run<GatherColumns<Acc, uint16_t>>(grad_data, s, lambda_data, gamma_data, Acc(scale), sums, dgamma_data, first,
                                          last);
      else
        run<GatherColumns<Acc, int32_t>>(grad_data, s, lambda_data, gamma_data, Acc(scale), sums, dgamma_data, first,
                                         last);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> sparse_update_backward(const at::Tensor& grad, at::TensorList pattern,
                                                          const at::Tensor& lambda, const at::Tensor& gamma,
                                                          double scale, bool need_lambda, bool need_gamma) {
  if (is_bits(pattern)) return unpacked_update_backward(grad, pattern, lambda, gamma, scale, need_lambda, need_gamma);
  TORCH_CHECK_VALUE(grad.dim() == 2, "grad must have shape [rows, M], got ", grad.sizes());
  const at::ScalarType acc = grad.scalar_type();
  at::Tensor dlambda, dgamma;
  if (is_planes(pattern)) {
    const LayerSizes layer = check_parameters(lambda, gamma, grad.size(1));
    check_update_gradient(grad, layer, layer.m, gamma);
    std::tie(dlambda, dgamma) =
        gather_packed(grad.contiguous(), check_packed(pattern, layer, gamma), as(lambda, acc), as(gamma, acc), scale);
  } else {
    const SparsePattern s = check_lists_of_layer(pattern, lambda, gamma, grad.size(1));
    check_update_gradient(grad, s, s.count, gamma);
    const at::Tensor g = grad.contiguous(), l = as(lambda, acc), gam = as(gamma, acc);
    const at::Tensor partial = at::zeros({divide_up(s.count, kColumnsPerSum), s.r, s.n}, g.options());
    dgamma = at::zeros({s.n, s.m}, g.options());
    with_sum_type(acc, [&](auto number) {
      backward<decltype(number)>(g, s, l, gam, scale, partial, dgamma);
    });
    dlambda = partial.sum(0);
  }
  return parameter_gradients(dlambda, dgamma, lambda, gamma, need_lambda, need_gamma);
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, CPU, m) {
  m.impl("sparse_update", &sparse_update);
  m.impl("sparse_update_backward", &sparse_update_backward);
}

}  // namespace randlora::cpu
