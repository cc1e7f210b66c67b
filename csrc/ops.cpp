// The schemas of torch.ops.randlora.*, and the ops as C++ functions. Kernels are registered at the end of cpu/<op>.cpp,
// cuda/<op>.cu and layer/linear.cpp; fake kernels, vmap and most of autograd in randlora/ops/.
#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "layer/schema.h"

TORCH_LIBRARY(randlora, m) {
  // A slice of a random base, see bases.h.
  m.def("fill_bases_(Tensor(a!) out, int seed, int stream, int[] offsets, float? sparsity=None) -> ()");

  // UniqueBaseGrad, see unique_base.h.
  m.def(
      "unique_base(Tensor A, Tensor randlora_lambda, Tensor randlora_gamma, float scale=1.0, ScalarType? dtype=None)"
      " -> Tensor");
  m.def(
      "unique_base_backward(Tensor grad, Tensor A, Tensor randlora_lambda, Tensor randlora_gamma, float scale=1.0,"
      " bool need_lambda=True, bool need_gamma=True) -> (Tensor, Tensor)");

  // The update of very sparse bases, see sparse_update.h.
  m.def(
      "sparse_update(Tensor[] pattern, Tensor randlora_lambda, Tensor randlora_gamma, int max_dim, float scale,"
      " Tensor? weight, ScalarType dtype) -> Tensor");
  m.def(
      "sparse_update_backward(Tensor grad, Tensor[] pattern, Tensor randlora_lambda, Tensor randlora_gamma,"
      " float scale, bool need_lambda, bool need_gamma) -> (Tensor, Tensor)");

  // Products of tokens with it, see sparse_products.h.
  m.def(
      "sparse_up_(Tensor(a!) out, Tensor x, Tensor[] pattern, Tensor randlora_lambda, Tensor randlora_gamma,"
      " float scale) -> ()");
  m.def(
      "sparse_down_(Tensor(a!) out, Tensor x, Tensor[] pattern, Tensor randlora_lambda, Tensor randlora_gamma,"
      " float scale) -> ()");
  m.def(
      "sparse_gradients(Tensor narrow, Tensor wide, Tensor(a!)? into_narrow, Tensor[] pattern,"
      " Tensor randlora_lambda, Tensor randlora_gamma, float scale) -> (Tensor, Tensor)");

  // The update of Hadamard bases, see hadamard.h.
  m.def(
      "hadamard_up_(Tensor(a!) out, Tensor x, Tensor[] pattern, Tensor randlora_lambda, Tensor randlora_gamma,"
      " float scale) -> ()");
  m.def(
      "hadamard_down_(Tensor(a!) out, Tensor x, Tensor[] pattern, Tensor randlora_lambda, Tensor randlora_gamma,"
      " float scale) -> ()");
  m.def(
      "hadamard_gradients(Tensor narrow, Tensor wide, Tensor(a!)? into_narrow, Tensor(b!)? into_wide,"
      " Tensor[] pattern, Tensor randlora_lambda, Tensor randlora_gamma, float scale) -> (Tensor, Tensor)");
  m.def(
      "hadamard_update(Tensor[] pattern, Tensor randlora_lambda, Tensor randlora_gamma, int max_dim, float scale,"
      " Tensor? weight, ScalarType dtype) -> Tensor");
  m.def(
      "hadamard_update_backward(Tensor grad, Tensor[] pattern, Tensor randlora_lambda, Tensor randlora_gamma,"
      " float scale, bool need_lambda, bool need_gamma) -> (Tensor, Tensor)");

  // Nothing, or an error if these are not the lists, planes, bits or signs of any bases. Ops do it by themselves; who
  // makes a pattern does it for a call that must not wait for the device, such as one under graph capture.
  m.def("check_pattern(Tensor[] pattern) -> ()");

  // Rows of packed ternary bases made dense, see packed_update.h.
  m.def(
      "packed_expand(Tensor[] pattern, int n, int min_dim, int max_dim, ScalarType dtype, int first=0, int? rows=None)"
      " -> (Tensor, Tensor)");

  // x with elements dropped by a mask that depends on (seed, p) and their position only, see dropout.h.
  m.def("dropout(Tensor x, Tensor seed, float p) -> Tensor");

  // A whole layer, see layer/arguments.h. Tensors come first; what is not a tensor is given by name.
  m.def(
      "linear(Tensor x, Tensor? weight, Tensor? bias, Tensor? A, Tensor? B, Tensor randlora_lambda,"
      " Tensor randlora_gamma, Tensor[] pattern, Tensor? seed, *, int out_features, float scale, ScalarType dtype,"
      " str strategy, float dropout, bool weight_is_transposed, int workspace, str? backward_strategy=None) -> Tensor");
  m.def(
      "linear_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? A, Tensor? B, Tensor randlora_lambda,"
      " Tensor randlora_gamma, Tensor[] pattern, Tensor? seed, *, float scale, ScalarType dtype, str strategy,"
      " float dropout, bool weight_is_transposed, int workspace, bool need_x, bool need_lambda, bool need_gamma)"
      " -> (Tensor, Tensor, Tensor)");
}

namespace randlora {
namespace {

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

void fill_bases_(const at::Tensor& out, int64_t seed, int64_t stream, at::IntArrayRef offsets,
                 std::optional<double> sparsity) {
  static const auto op = find<decltype(fill_bases_)>("randlora::fill_bases_");
  op.call(out, seed, stream, offsets, sparsity);
}

at::Tensor unique_base(const at::Tensor& A, const at::Tensor& lambda, const at::Tensor& gamma, double scale,
                       std::optional<at::ScalarType> dtype) {
  static const auto op = find<decltype(unique_base)>("randlora::unique_base");
  return op.call(A, lambda, gamma, scale, dtype);
}

std::tuple<at::Tensor, at::Tensor> unique_base_backward(const at::Tensor& grad, const at::Tensor& A,
                                                        const at::Tensor& lambda, const at::Tensor& gamma, double scale,
                                                        bool need_lambda, bool need_gamma) {
  static const auto op = find<decltype(unique_base_backward)>("randlora::unique_base_backward");
  return op.call(grad, A, lambda, gamma, scale, need_lambda, need_gamma);
}

at::Tensor sparse_update(at::TensorList pattern, const at::Tensor& lambda, const at::Tensor& gamma, int64_t max_dim,
                         double scale, const std::optional<at::Tensor>& weight, at::ScalarType dtype) {
  static const auto op = find<decltype(sparse_update)>("randlora::sparse_update");
  return op.call(pattern, lambda, gamma, max_dim, scale, weight, dtype);
}

std::tuple<at::Tensor, at::Tensor> sparse_update_backward(const at::Tensor& grad, at::TensorList pattern,
                                                          const at::Tensor& lambda, const at::Tensor& gamma,
                                                          double scale, bool need_lambda, bool need_gamma) {
  static const auto op = find<decltype(sparse_update_backward)>("randlora::sparse_update_backward");
  return op.call(grad, pattern, lambda, gamma, scale, need_lambda, need_gamma);
}

void sparse_up_(const at::Tensor& out, const at::Tensor& x, at::TensorList pattern, const at::Tensor& lambda,
                const at::Tensor& gamma, double scale) {
  static const auto op = find<decltype(sparse_up_)>("randlora::sparse_up_");
  op.call(out, x, pattern, lambda, gamma, scale);
}

void sparse_down_(const at::Tensor& out, const at::Tensor& x, at::TensorList pattern, const at::Tensor& lambda,
                  const at::Tensor& gamma, double scale) {
  static const auto op = find<decltype(sparse_down_)>("randlora::sparse_down_");
  op.call(out, x, pattern, lambda, gamma, scale);
}

std::tuple<at::Tensor, at::Tensor> sparse_gradients(const at::Tensor& narrow, const at::Tensor& wide,
                                                    const std::optional<at::Tensor>& into_narrow,
                                                    at::TensorList pattern, const at::Tensor& lambda,
                                                    const at::Tensor& gamma, double scale) {
  static const auto op = find<decltype(sparse_gradients)>("randlora::sparse_gradients");
  return op.call(narrow, wide, into_narrow, pattern, lambda, gamma, scale);
}

std::tuple<at::Tensor, at::Tensor> packed_expand(at::TensorList pattern, int64_t n, int64_t min_dim, int64_t max_dim,
                                                 at::ScalarType dtype, int64_t first, std::optional<int64_t> rows) {
  static const auto op = find<decltype(packed_expand)>("randlora::packed_expand");
  return op.call(pattern, n, min_dim, max_dim, dtype, first, rows);
}

void hadamard_up_(const at::Tensor& out, const at::Tensor& x, at::TensorList pattern, const at::Tensor& lambda,
                  const at::Tensor& gamma, double scale) {
  static const auto op = find<decltype(hadamard_up_)>("randlora::hadamard_up_");
  op.call(out, x, pattern, lambda, gamma, scale);
}

void hadamard_down_(const at::Tensor& out, const at::Tensor& x, at::TensorList pattern, const at::Tensor& lambda,
                    const at::Tensor& gamma, double scale) {
  static const auto op = find<decltype(hadamard_down_)>("randlora::hadamard_down_");
  op.call(out, x, pattern, lambda, gamma, scale);
}

std::tuple<at::Tensor, at::Tensor> hadamard_gradients(const at::Tensor& narrow, const at::Tensor& wide,
                                                      const std::optional<at::Tensor>& into_narrow,
                                                      const std::optional<at::Tensor>& into_wide,
                                                      at::TensorList pattern, const at::Tensor& lambda,
                                                      const at::Tensor& gamma, double scale) {
  static const auto op = find<decltype(hadamard_gradients)>("randlora::hadamard_gradients");
  return op.call(narrow, wide, into_narrow, into_wide, pattern, lambda, gamma, scale);
}

at::Tensor hadamard_update(at::TensorList pattern, const at::Tensor& lambda, const at::Tensor& gamma, int64_t max_dim,
                           double scale, const std::optional<at::Tensor>& weight, at::ScalarType dtype) {
  static const auto op = find<decltype(hadamard_update)>("randlora::hadamard_update");
  return op.call(pattern, lambda, gamma, max_dim, scale, weight, dtype);
}

std::tuple<at::Tensor, at::Tensor> hadamard_update_backward(const at::Tensor& grad, at::TensorList pattern,
                                                            const at::Tensor& lambda, const at::Tensor& gamma,
                                                            double scale, bool need_lambda, bool need_gamma) {
  static const auto op = find<decltype(hadamard_update_backward)>("randlora::hadamard_update_backward");
  return op.call(grad, pattern, lambda, gamma, scale, need_lambda, need_gamma);
}

at::Tensor dropout(const at::Tensor& x, const at::Tensor& seed, double p) {
  static const auto op = find<decltype(dropout)>("randlora::dropout");
  return op.call(x, seed, p);
}

at::Tensor call_linear(const LayerArguments& a) {
  static const auto op = find<decltype(linear_kernel<call_linear>)>("randlora::linear");
  return op.call(a.x, a.weight, a.bias, a.A, a.B, a.lambda, a.gamma, a.pattern, a.seed, a.out_features, a.scale,
                 a.dtype, a.strategy, a.dropout, a.weight_is_transposed, a.workspace, a.backward_strategy);
}

LayerGradients call_linear_backward(const at::Tensor& grad, const LayerArguments& a, const Needed& needed) {
  static const auto op = find<decltype(linear_backward_kernel<call_linear_backward>)>("randlora::linear_backward");
  return op.call(grad, a.x, a.weight, a.A, a.B, a.lambda, a.gamma, a.pattern, a.seed, a.scale, a.dtype,
                 a.backward_strategy, a.dropout, a.weight_is_transposed, a.workspace, needed.x, needed.lambda,
                 needed.gamma);
}

}  // namespace randlora
