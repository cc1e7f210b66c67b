// UniqueBaseGrad on the CPU. Both directions are bound by memory: the forward streams S out, the backward streams the
// gradient in, and everything else is sized to stay in cache.
#include "unique_base.h"

#include <algorithm>
#include <memory>
#include <tuple>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/large.h"
#include "cpu/vec.h"
#include "dtypes.h"
#include "parameter_gradients.h"
#include "sizes.h"

namespace randlora::cpu {
namespace {

constexpr int64_t kTile = 1024;     // columns j of a task: a tile of gamma and its gradient stay in L1
constexpr int64_t kRowBlock = 32;   // rows k of A packed together: 128 KB of fp32, in L2
constexpr int64_t kBaseChunk = 16;  // bases i of a task, over which packing A is spread
constexpr int kUnroll = 4;          // rows k in flight at once in the backward

// rows x cols of storage T, any strides, to contiguous accumulators [rows, cols].
template <class T, class Acc>
struct PackRows {
  static RANDLORA_INLINE void run(Acc* to, const T* from, int64_t rows, int64_t cols, int64_t row_stride,
                                  int64_t col_stride) {
    for (int64_t k = 0; k < rows; ++k, from += row_stride, to += cols) {
      int64_t j = 0;
      if constexpr (std::is_same_v<acc_t<T>, Acc>) {
        if (col_stride == 1)
          for (; j + kLanes<Acc> <= cols; j += kLanes<Acc>) store(to + j, load(from + j));
      }
      for (; j < cols; ++j) to[j] = static_cast<Acc>(from[j * col_stride]);
    }
  }
};

// A block of a matrix as accumulators: in place where it already is that, otherwise packed into `buffer`.
template <class Acc>
struct Rows {
  const Acc* data;
  int64_t stride;
};

template <class Acc>
Rows<Acc> rows_of(const at::Tensor& t, int64_t offset, int64_t rows, int64_t cols, int64_t row_stride,
                  int64_t col_stride, Acc* buffer) {
  if (t.scalar_type() == c10::CppTypeToScalarType<Acc>::value && col_stride == 1)
    return {t.const_data_ptr<Acc>() + offset, row_stride};
  with_float_type(t.scalar_type(), [&](auto number) {
    using T = decltype(number);
    run<PackRows<T, Acc>>(buffer, t.const_data_ptr<T>() + offset, rows, cols, row_stride, col_stride);
  });
  return {buffer, cols};
}

// S[k, i, 0:width] = (lambda[k, i] * A[k, 0:width]) * gamma[i, 0:width] for `count` bases i.
template <class T>
struct ScaleRows {
  using Acc = acc_t<T>;
  static RANDLORA_INLINE void run(T* out, const Acc* a, const Acc* lambda, const Acc* gamma, Acc scale, int64_t count,
                                  int64_t width, int64_t m) {
    constexpr int L = kLanes<Acc>;
    for (int64_t i = 0; i < count; ++i, out += m, gamma += m) {
      const Acc c = lambda[i] * scale;
      int64_t j = 0;
      for (; j + L <= width; j += L) store(out + j, c * load(a + j) * load(gamma + j));
      if (j < width) {
        const int64_t rest = width - j;
        store_some(out + j, c * load_some(a + j, rest) * load_some(gamma + j, rest), rest);
      }
    }
  }
};

template <class T>
void forward(const at::Tensor& out, const at::Tensor& A, const at::Tensor& lambda, const at::Tensor& gamma,
             double scale, UniqueBaseShape s) {
  using Acc = acc_t<T>;
  T* const out_data = out.mutable_data_ptr<T>();          // [r, n, m]
  const Acc* lambda_data = lambda.const_data_ptr<Acc>();  // [r, n]
  const Acc* gamma_data = gamma.const_data_ptr<Acc>();    // [n, m]
  const int64_t tiles = divide_up(s.m, kTile), chunks = divide_up(s.n, kBaseChunk);
  at::parallel_for(0, s.r * chunks * tiles, 2, [&](int64_t begin, int64_t end) {
    alignas(64) Acc buffer[kTile];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t k = task / (chunks * tiles), i = task / tiles % chunks * kBaseChunk, j = task % tiles * kTile;
      const int64_t width = std::min(kTile, s.m - j), count = std::min(kBaseChunk, s.n - i);
      const Rows<Acc> a = rows_of<Acc>(A, k * A.stride(0) + j * A.stride(2), 1, width, 0, A.stride(2), buffer);
      run<ScaleRows<T>>(out_data + (k * s.n + i) * s.m + j, a.data, lambda_data + k * s.n + i, gamma_data + i * s.m + j,
                        Acc(scale), count, width, s.m);
    }
  });
}

// One base i, one tile of columns, `Count` rows k: reads each gradient element once and adds to both results.
template <class T, int Count>
RANDLORA_INLINE void reduce_rows(const T* grad, int64_t grad_stride, Rows<acc_t<T>> a, const acc_t<T>* lambda,
                                 int64_t lambda_stride, const acc_t<T>* gamma, acc_t<T>* dgamma, acc_t<T>* dlambda,
                                 int64_t dlambda_stride, acc_t<T> scale, int64_t width) {
  using Acc = acc_t<T>;
  constexpr int L = kLanes<Acc>;
  Acc scaled[Count];
  for (int u = 0; u < Count; ++u) scaled[u] = lambda[u * lambda_stride] * scale;
  Vec<Acc> sums[Count] = {};
  int64_t j = 0;
  for (; j + L <= width; j += L) {
    const Vec<Acc> g = load(gamma + j);
    Vec<Acc> d = load(dgamma + j);
    for (int u = 0; u < Count; ++u) {
      const Vec<Acc> t = load(grad + u * grad_stride + j) * load(a.data + u * a.stride + j);
      sums[u] += t * g;
      d += t * scaled[u];
    }
    store(dgamma + j, d);
  }
  if (j < width) {
    const int64_t rest = width - j;
    const Vec<Acc> g = load_some(gamma + j, rest);
    Vec<Acc> d = load_some(dgamma + j, rest);
    for (int u = 0; u < Count; ++u) {
      const Vec<Acc> t = load_some(grad + u * grad_stride + j, rest) * load_some(a.data + u * a.stride + j, rest);
      sums[u] += t * g;
      d += t * scaled[u];
    }
    store_some(dgamma + j, d, rest);
  }
  for (int u = 0; u < Count; ++u) dlambda[u * dlambda_stride] = sum<Acc, 64>(sums[u]);
}

template <class T>
struct ReduceRows {
  using Acc = acc_t<T>;
  static RANDLORA_INLINE void run(const T* grad, int64_t grad_stride, const Rows<Acc>& a, const Acc* lambda,
                                  const Acc* gamma, Acc* dgamma, Acc* dlambda, Acc scale, int64_t n, int64_t rows,
                                  int64_t width) {
    int64_t k = 0;
    for (; k + kUnroll <= rows; k += kUnroll)
      reduce_rows<T, kUnroll>(grad + k * grad_stride, grad_stride, {a.data + k * a.stride, a.stride}, lambda + k * n, n,
                              gamma, dgamma, dlambda + k * n, n, scale, width);
    for (; k < rows; ++k)
      reduce_rows<T, 1>(grad + k * grad_stride, 0, {a.data + k * a.stride, 0}, lambda + k * n, 0, gamma, dgamma,
                        dlambda + k * n, 0, scale, width);
  }
};

// partial: [tiles, r, n], a sum per tile of columns, so that the order of additions does not depend on the threads; may
// be dlambda where there is one tile.
template <class T>
void backward(const at::Tensor& grad, const at::Tensor& A, const at::Tensor& lambda, const at::Tensor& gamma,
              const at::Tensor& partial, const at::Tensor& dlambda, const at::Tensor& dgamma, double scale,
              UniqueBaseShape s) {
  using Acc = acc_t<T>;
  const T* grad_data = grad.const_data_ptr<T>();          // [r, n, m], any strides
  const Acc* lambda_data = lambda.const_data_ptr<Acc>();  // [r, n]
  const Acc* gamma_data = gamma.const_data_ptr<Acc>();    // [n, m]
  Acc* const partial_data = partial.mutable_data_ptr<Acc>();
  Acc* const dlambda_data = dlambda.mutable_data_ptr<Acc>();  // [r, n]
  Acc* const dgamma_data = dgamma.mutable_data_ptr<Acc>();    // [n, m]
  const int64_t tiles = divide_up(s.m, kTile), chunks = divide_up(s.n, kBaseChunk);
  const int64_t tile_width = std::min(kTile, s.m), block_rows = std::min(kRowBlock, s.r);
  const bool grad_in_place = grad.stride(2) == 1;

  at::parallel_for(0, chunks * tiles, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Acc[]> a_buffer(new Acc[block_rows * tile_width]);
    const std::unique_ptr<T[]> grad_buffer(grad_in_place ? nullptr : new T[block_rows * tile_width]);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i_begin = task / tiles * kBaseChunk, i_end = std::min(s.n, i_begin + kBaseChunk);
      const int64_t tile = task % tiles, j = tile * kTile, width = std::min(kTile, s.m - j);
      for (int64_t i = i_begin; i < i_end; ++i) std::fill_n(dgamma_data + i * s.m + j, width, Acc(0));
      for (int64_t k = 0; k < s.r; k += kRowBlock) {
        const int64_t rows = std::min(kRowBlock, s.r - k);
        const Rows<Acc> a =
            rows_of<Acc>(A, k * A.stride(0) + j * A.stride(2), rows, width, A.stride(0), A.stride(2), a_buffer.get());
        for (int64_t i = i_begin; i < i_end; ++i) {
          const T* g = grad_data + k * grad.stride(0) + i * grad.stride(1) + j * grad.stride(2);
          int64_t g_stride = grad.stride(0);
          if (!grad_in_place) {
            for (int64_t row = 0; row < rows; ++row)
              for (int64_t col = 0; col < width; ++col)
                grad_buffer[row * width + col] = g[row * grad.stride(0) + col * grad.stride(2)];
            g = grad_buffer.get();
            g_stride = width;
          }
          run<ReduceRows<T>>(g, g_stride, a, lambda_data + k * s.n + i, gamma_data + i * s.m + j,
                             dgamma_data + i * s.m + j, partial_data + (tile * s.r + k) * s.n + i, Acc(scale), s.n,
                             rows, width);
        }
      }
    }
  });
  for (int64_t e = 0; e < s.r * s.n; ++e) {
    Acc sum = partial_data[e];
    for (int64_t tile = 1; tile < tiles; ++tile) sum += partial_data[tile * s.r * s.n + e];
    dlambda_data[e] = sum * Acc(scale);
  }
}

at::Tensor unique_base(const at::Tensor& A, const at::Tensor& lambda, const at::Tensor& gamma, double scale,
                       std::optional<at::ScalarType> dtype) {
  const UniqueBaseShape s = check_unique_base(A, lambda, gamma);
  const at::ScalarType result = unique_base_dtype(A, lambda, gamma, dtype);
  const at::ScalarType acc = accumulate_type(A, lambda, gamma, result);
  // Kernels write fp64 for fp64 arithmetic; a narrower result of fp64 inputs is rounded afterwards.
  const at::Tensor out = advise_large(at::empty({s.r, s.n, s.m}, A.options().dtype(acc == at::kDouble ? acc : result)));
  const at::Tensor lambda_acc = lambda.to(acc).contiguous(), gamma_acc = gamma.to(acc).contiguous();
  with_float_type(out.scalar_type(), [&](auto t) {
    forward<decltype(t)>(out, A, lambda_acc, gamma_acc, scale, s);
  });
  return out.to(result);
}

std::tuple<at::Tensor, at::Tensor> unique_base_backward(const at::Tensor& grad, const at::Tensor& A,
                                                        const at::Tensor& lambda, const at::Tensor& gamma, double scale,
                                                        bool need_lambda, bool need_gamma) {
  const UniqueBaseShape s = check_unique_base(A, lambda, gamma);
  check_unique_base_grad(grad, A, s);
  const at::ScalarType acc = accumulate_type(A, lambda, gamma, grad.scalar_type());
  const at::Tensor lambda_acc = lambda.to(acc).contiguous(), gamma_acc = gamma.to(acc).contiguous();
  const at::Tensor grad_acc = acc == at::kDouble ? grad.to(acc) : grad;
  const auto options = A.options().dtype(acc);
  const at::Tensor dlambda = at::empty({s.r, s.n}, options), dgamma = at::empty({s.n, s.m}, options);
  const int64_t tiles = divide_up(s.m, kTile);
  const at::Tensor partial = tiles == 1 ? dlambda : at::empty({tiles, s.r, s.n}, options);
  with_float_type(grad_acc.scalar_type(), [&](auto t) {
    backward<decltype(t)>(grad_acc, A, lambda_acc, gamma_acc, partial, dlambda, dgamma, scale, s);
  });
  return parameter_gradients(dlambda, dgamma, lambda, gamma, need_lambda, need_gamma);
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, CPU, m) {
  m.impl("unique_base", &unique_base);
  m.impl("unique_base_backward", &unique_base_backward);
}

}  // namespace randlora::cpu
