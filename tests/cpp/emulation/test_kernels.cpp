// The kernels of csrc/cuda on the CPU (see cuda_runtime.h) against the CPU's ops, bit for bit where the definition
// fixes the bits, and against the formulas in float64 elsewhere. Every case runs twice, its threads and blocks in both
// orders. Results are born as NaN, so that an element which no thread writes is noticed; accesses out of bounds or of a
// pack at an address that is none of its multiples are the sanitizers' part.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <cuda_runtime.h>

#include "../check.h"

void test_emulation();

namespace {

using Tensors = std::vector<at::Tensor>;

constexpr at::ScalarType kFloats[] = {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf};

// An op by name; `emulated` runs its CUDA kernel in both orders, on tensors of the CPU.
template <class Signature>
struct Op;

template <class Result, class... Args>
struct Op<Result(Args...)> {
  c10::TypedOperatorHandle<Result(Args...)> handle;

  explicit Op(const char* name)
      : handle(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Result(Args...)>()) {}

  Result cpu(Args... args) const { return handle.call(args...); }

  Result emulated(Args... args) const {
    const c10::DispatchKeySet cuda(c10::DispatchKey::CUDA);
    const auto forwards = handle.redispatch(cuda, args...);
    emulation::backwards = true;
    const auto backwards = handle.redispatch(cuda, args...);
    emulation::backwards = false;
    CHECK_THAT(same(forwards, backwards), "the order of threads and blocks shows in the result");
    return forwards;
  }

  static bool same(const at::Tensor& a, const at::Tensor& b) { return a.equal(b); }
  static bool same(const std::tuple<at::Tensor, at::Tensor>& a, const std::tuple<at::Tensor, at::Tensor>& b) {
    return std::get<0>(a).equal(std::get<0>(b)) && std::get<1>(a).equal(std::get<1>(b));
  }
};

using Pair = std::tuple<at::Tensor, at::Tensor>;
using OptionalType = std::optional<at::ScalarType>;

const Op<at::Tensor(const at::Tensor&, const at::Tensor&, double)>& dropout() {
  static const Op<at::Tensor(const at::Tensor&, const at::Tensor&, double)> op("randlora::dropout");
  return op;
}

double unit_roundoff(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return 0x1p-53;
    case at::kFloat: return 0x1p-24;
    case at::kHalf: return 0x1p-11;
    default: return 0x1p-8;
  }
}

// Whether `got` is `exact` (float64) but for its own rounding and that of a sum of `terms` numbers in `acc`; `size` is
// the sum of their absolute values.
bool rounding_only(const at::Tensor& got, const at::Tensor& exact, const at::Tensor& size, int64_t terms,
                   at::ScalarType acc) {
  const double tiny = got.scalar_type() == at::kHalf ? 0x1p-24 : 1e-40;
  const at::Tensor bound =
      exact.abs() * (1.01 * unit_roundoff(got.scalar_type())) + size * (double(terms + 4) * unit_roundoff(acc)) + tiny;
  return got.sizes() == exact.sizes() && ((got.to(at::kDouble) - exact).abs() <= bound).all().item<bool>();
}

// ---- bases
// -----------------------------------------------------------------------------------------------------------

void bases() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("randlora::fill_bases_", "")
          .typed<void(const at::Tensor&, int64_t, int64_t, c10::IntArrayRef, std::optional<double>)>();
  const auto compare = [&](const at::Tensor& whole, std::vector<int64_t> shape, std::vector<int64_t> offsets,
                           int64_t stream, std::optional<double> sparsity) {
    at::Tensor results[3];
    for (int way = 0; way < 3; ++way) {
      results[way] = whole.clone();  // what the slice does not cover must stay
      at::Tensor out = results[way];
      for (int axis = 0; axis < 3; ++axis) out = out.narrow(axis, 0, shape[size_t(axis)]);
      emulation::backwards = way == 2;
      if (way == 0)
        op.call(out, 0x123456789ABCDEF, stream, offsets, sparsity);
      else
        op.redispatch(c10::DispatchKeySet(c10::DispatchKey::CUDA), out, 0x123456789ABCDEF, stream, offsets, sparsity);
    }
    emulation::backwards = false;
    CHECK_THAT(results[0].equal(results[1]) && results[0].equal(results[2]), whole.scalar_type(), " ",
               c10::IntArrayRef(shape), " in ", whole.sizes(), " from ", c10::IntArrayRef(offsets),
               sparsity.has_value() ? " ternary" : " dense");
  };
  const std::vector<std::vector<int64_t>> offsets = {
      {0, 0, 0}, {3, 2, 1}, {7, 5, 6}, {9, 0, 4}, {2147480000, 2147480000, 2147480000}};
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf, at::kChar})
    for (const bool ternary : {false, true}) {
      if (type == at::kChar && !ternary) continue;
      const std::optional<double> sparsity = ternary ? std::optional(3.0) : std::nullopt;
      for (const auto& from : offsets) {
        compare(at::full({9, 9, 16}, 77, type), {9, 8, 13}, from, 1, sparsity);  // rows aligned for packs
        compare(at::full({9, 9, 13}, 77, type), {9, 9, 13}, from, 1, sparsity);
        compare(at::full({5, 1, 341}, 77, type), {5, 1, 341}, {from[0], 0, from[2]}, 0, sparsity);
      }
      compare(at::full({1, 1, 1}, 77, type), {1, 1, 1}, {0, 0, 0}, 1, sparsity);
      compare(at::full({3, 1, 4096}, 77, type), {2, 1, 4095}, {0, 0, 0}, 0, sparsity);  // several blocks along a row
    }
  compare(at::full({9000, 1, 3}, 77, at::kFloat), {8999, 1, 3}, {0, 0, 0}, 1, {});  // several rows for a thread
  compare(at::full({3, 0, 3}, 77, at::kFloat), {3, 0, 3}, {0, 0, 0}, 1, {});
}

// ---- dropout
// ---------------------------------------------------------------------------------------------------------

void dropout_masks() {
  const at::Tensor seed = at::full({1}, int64_t(0x7EDCBA9876543210), at::kLong);
  for (const at::ScalarType type : kFloats)
    for (const double p : {0.0, 0.3, 0.9})
      for (const int64_t size : {0, 1, 3, 4, 41, 341, 1000, 4097})
        for (const int64_t offset : {0, 1}) {
          const at::Tensor x = at::randn({size + offset}, type).narrow(0, offset, size);
          CHECK_THAT(dropout().emulated(x, seed, p).equal(dropout().cpu(x, seed, p)), type, " p ", p, " size ", size,
                     " offset ", offset);
        }
  const at::Tensor columns = at::randn({41, 24}).t();
  CHECK_THAT(dropout().emulated(columns, seed, 0.5).equal(dropout().cpu(columns, seed, 0.5)), "strided");
  const at::Tensor large = at::full({132 * 32 * 256 * 8 + 1000}, 1, at::kBFloat16);  // more than one step of the grid
  CHECK_THAT(dropout().emulated(large, seed, 0.5).equal(dropout().cpu(large, seed, 0.5)), "several steps");
}

// ---- UniqueBaseGrad
// --------------------------------------------------------------------------------------------------

void compare_unique_base(int64_t r, int64_t n, int64_t m, at::ScalarType storage, at::ScalarType a_type,
                         at::ScalarType parameters, int layout) {
  static const Op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, double, OptionalType)> forward(
      "randlora::unique_base");
  static const Op<Pair(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double, bool, bool)>
      backward("randlora::unique_base_backward");
  const double scale = 1.7;
  at::Tensor A = at::randn({r + 2, 1, m + 5}, a_type).narrow(0, 0, r).narrow(2, 0, m);
  at::Tensor grad = at::randn({r, n + 3, m + 8}, storage).narrow(1, 1, n).narrow(2, 0, m);
  at::Tensor lambda = at::randn({n, r}, parameters).t(), gamma = at::randn({n, m + 1}, parameters).narrow(1, 1, m);
  if (layout == 0) {
    A = A.contiguous(), grad = grad.contiguous(), lambda = lambda.contiguous(), gamma = gamma.contiguous();
  } else if (layout == 2) {
    A = A.permute({2, 1, 0}).contiguous().permute({2, 1, 0});
    grad = grad.permute({2, 0, 1}).contiguous().permute({1, 2, 0});
  }
  const std::string where = check::text("r ", r, " n ", n, " m ", m, " S ", storage, " A ", a_type, " lambda ",
                                        parameters, " layout ", layout);

  const at::Tensor S = forward.emulated(A, lambda, gamma, scale, storage);
  CHECK_THAT(S.scalar_type() == storage && S.equal(forward.cpu(A, lambda, gamma, scale, storage)), where);

  const auto [dlambda, dgamma] = backward.emulated(grad, A, lambda, gamma, scale, true, true);
  CHECK_THAT(dlambda.scalar_type() == parameters && dgamma.scalar_type() == parameters, where);
  const at::Tensor a = A.to(at::kDouble), l = lambda.to(at::kDouble), g = gamma.to(at::kDouble);
  const at::Tensor t = grad.to(at::kDouble) * a * scale, by_lambda = t * g, by_gamma = t * l.unsqueeze(2);
  const bool fp64 = storage == at::kDouble || a_type == at::kDouble || parameters == at::kDouble;
  const at::ScalarType acc = fp64 ? at::kDouble : at::kFloat;
  CHECK_THAT(rounding_only(dlambda, by_lambda.sum(2), by_lambda.abs().sum(2), m, acc), where, " dlambda");
  CHECK_THAT(rounding_only(dgamma, by_gamma.sum(0), by_gamma.abs().sum(0), r, acc), where, " dgamma");
}

void unique_base() {
  constexpr int64_t shapes[][3] = {{1, 1, 1},     {3, 5, 7},    {1, 41, 3},  {4, 3, 41},
                                   {33, 11, 341}, {2, 2, 1000}, {5, 1, 2500}};
  for (const auto& [r, n, m] : shapes)
    for (const int layout : {0, 1, 2}) {
      for (const at::ScalarType type : kFloats) compare_unique_base(r, n, m, type, type, type, layout);
      compare_unique_base(r, n, m, at::kBFloat16, at::kBFloat16, at::kFloat, layout);
      compare_unique_base(r, n, m, at::kHalf, at::kHalf, at::kFloat, layout);
      compare_unique_base(r, n, m, at::kFloat, at::kBFloat16, at::kFloat, layout);   // a layer's backward in 16 bits
      compare_unique_base(r, n, m, at::kBFloat16, at::kHalf, at::kFloat, layout);    // A in neither type
      compare_unique_base(r, n, m, at::kBFloat16, at::kFloat, at::kDouble, layout);  // fp64 arithmetic, 16-bit results
    }
}

// ---- updates of very sparse bases
// ------------------------------------------------------------------------------------

at::Tensor random_ternary(at::IntArrayRef shape, int z) {
  const at::Tensor u = at::randint(2 * z, shape, at::kLong);
  return u.eq(0).to(at::kChar) - u.eq(1).to(at::kChar);
}

at::Tensor from(const std::vector<int64_t>& values, at::ScalarType type) {
  return at::tensor(values, at::kLong).to(type);
}

at::Tensor random_bits(int64_t rows, int64_t planes, int64_t words) {
  const at::Tensor one = at::randint(-32768, 32768, {rows, 1, words}, at::kShort);
  if (planes == 1) return one;
  const at::Tensor other = at::randint(-32768, 32768, one.sizes(), at::kShort);
  const at::Tensor both = at::zeros({rows, 2, words}, at::kShort);
  both.narrow(1, 0, 1).copy_(one.bitwise_and(other));
  both.narrow(1, 1, 1).copy_(one.bitwise_and(other.bitwise_not()));
  return both;
}

void packed_expand() {
  static const Op<Pair(at::TensorList, int64_t, int64_t, int64_t, at::ScalarType, int64_t, std::optional<int64_t>)> op(
      "randlora::packed_expand");
  constexpr int64_t shapes[][4] = {{1, 1, 1, 1}, {3, 5, 7, 16}, {5, 9, 41, 64}, {32, 3, 341, 1000}, {2, 1, 1000, 17}};
  for (const auto& [r, n, m, M] : shapes) {
    // A store with more columns of A, rows and columns of B2 than the layer has.
    const at::Tensor A = random_ternary({r, m + 3}, 3);
    std::vector<int64_t> starts = {0}, entries;
    const auto a = A.accessor<int8_t, 2>();
    for (int64_t k = 0; k < r; ++k) {
      for (int64_t j = 0; j < m + 3; ++j)
        if (a[k][j] != 0) entries.push_back(2 * j + (a[k][j] < 0));
      starts.push_back(int64_t(entries.size()));
    }
    const at::Tensor lists[] = {from(starts, at::kInt), from(entries, at::kInt)};
    const Tensors patterns[] = {{lists[0], lists[1], random_bits(n * r + 2, 2, M / 16 + 2)},
                                {random_bits(r, 2, m / 16 + 2), random_bits(n * r + 2, 2, M / 16 + 2)},
                                {random_bits(r, 1, m / 16 + 2), random_bits(n * r + 2, 1, M / 16 + 2)}};
    for (const Tensors& pattern : patterns)
      for (const at::ScalarType type : kFloats)
        for (const int64_t first : {int64_t(0), r / 2}) {
          const std::optional<int64_t> rows = first > 0 ? std::optional((r - first + 1) / 2) : std::nullopt;
          const auto [got_A, got_B] = op.emulated(pattern, n, m, M, type, first, rows);
          const auto [A_cpu, B_cpu] = op.cpu(pattern, n, m, M, type, first, rows);
          CHECK_THAT(got_A.equal(A_cpu) && got_B.equal(B_cpu), "r ", r, " n ", n, " m ", m, " M ", M, " ", type, " of ",
                     pattern.size(), " tensors from row ", first);
        }
  }
}

}  // namespace

int main() {
  // at::empty gives NaN then.
  at::globalContext().setDeterministicAlgorithms(true, false);
  at::globalContext().setDeterministicFillUninitializedMemory(true);
  test_emulation();
  check::run("bases have the bits of the CPU", bases);
  check::run("dropout has the bits of the CPU", dropout_masks);
  check::run("unique_base", unique_base);
  check::run("packed_expand", packed_expand);
  return check::finish();
}
