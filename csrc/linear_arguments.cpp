#include <algorithm>
#include <charconv>
#include <limits>

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include "dropout.h"
#include "linear.h"
#include "packed_update.h"
#include "sizes.h"
#include "sparse_update.h"

namespace randlora {
namespace {

// Whether ATen's products of this 16-bit type go through oneDNN, which they do where the CPU has what it takes.
bool multiplies(const char* query) {
  const auto op = c10::Dispatcher::singleton().findSchema({query, ""});
  return op.has_value() && op->typed<bool()>().call();
}

}  // namespace

void check_tensor(const at::Tensor& t, const char* name, const at::Tensor& x) {
  TORCH_CHECK_TYPE(is_float(t.scalar_type()), name, " must be float64, float32, bfloat16 or float16, got ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(t.layout() == at::kStrided && t.device() == x.device(), name,
                    " must be a strided tensor on the device of x, ", x.device(), ", got ", t.layout(), " on ",
                    t.device());
}

Strategy parse_strategy(std::string_view plan, int64_t tokens) {
  std::optional<Strategy> found;
  for (std::string_view rest = plan;;) {
    const size_t comma = rest.find(','), length = std::min(comma, rest.size());
    const std::string_view part = rest.substr(0, length), name = part.substr(0, part.find('<'));
    int64_t limit = std::numeric_limits<int64_t>::max();
    bool parsed = name.size() == part.size();
    if (!parsed) {
      const char* const end = part.data() + part.size();
      const auto [stop, error] = std::from_chars(part.data() + name.size() + 1, end, limit);
      parsed = error == std::errc() && stop == end;
    }
    TORCH_CHECK_VALUE(parsed && (name == "factored" || name == "materialized" || name == "merged"),
                      "strategy must be factored, materialized or merged, got \"", plan, "\"");
    if (!found.has_value() && tokens < limit)
      found = name == "factored"       ? Strategy::factored
              : name == "materialized" ? Strategy::materialized
                                       : Strategy::merged;
    if (comma == std::string_view::npos) break;
    rest.remove_prefix(comma + 1);
  }
  TORCH_CHECK_VALUE(found.has_value(), "strategy must end with a name that has no limit, got \"", plan, "\"");
  return *found;
}

int64_t tokens_of(const at::Tensor& x) {
  int64_t tokens = 1;
  for (int64_t axis = 0; axis + 1 < x.dim(); ++axis) tokens *= x.size(axis);
  return tokens;
}

void check(const LayerArguments& a) {
  TORCH_CHECK_VALUE(a.x.dim() >= 1, "x must have shape [..., in], got a tensor without dimensions");
  TORCH_CHECK_TYPE(is_float(a.dtype), "dtype must be float64, float32, bfloat16 or float16, got ", a.dtype);
  check_tensor(a.x, "x", a.x);
  check_tensor(a.lambda, "randlora_lambda", a.x);
  check_tensor(a.gamma, "randlora_gamma", a.x);
  if (a.weight.has_value()) check_tensor(*a.weight, "weight", a.x);
  if (a.bias.has_value()) check_tensor(*a.bias, "bias", a.x);
  const int64_t in = a.x.size(-1), out = a.out_features, m = std::min(in, out), M = std::max(in, out);
  check_size("in features", in);
  check_size("out features", out);
  if (a.weight.has_value()) {
    const at::Tensor& w = *a.weight;
    const int64_t in_axis = a.weight_is_transposed ? 0 : 1;
    TORCH_CHECK_VALUE(w.dim() == 2 && w.size(in_axis) == in && w.size(1 - in_axis) == out, "weight must have shape ",
                      a.weight_is_transposed ? "[in, out]" : "[out, in]", " with in = ", in, " as in x ", a.x.sizes(),
                      " and out = ", out, ", got ", w.sizes());
  }
  TORCH_CHECK_VALUE(!a.bias.has_value() || (a.bias->dim() == 1 && a.bias->size(0) == out && a.weight.has_value()),
                    "bias must have shape [out] = [", out, "] and come with a weight");
  TORCH_CHECK_VALUE(a.lambda.dim() == 2 && a.lambda.numel() > 0, "randlora_lambda must have shape [r, n], got ",
                    a.lambda.sizes());
  const int64_t r = a.lambda.size(0), n = a.lambda.size(1);
  check_size("r", r);
  check_size("n", n);
  TORCH_CHECK_VALUE(a.gamma.dim() == 2 && a.gamma.size(0) == n && a.gamma.size(1) == m,
                    "randlora_gamma must have shape [n, m] = [", n, ", ", m, "], got ", a.gamma.sizes());
  if (a.pattern.empty()) {
    TORCH_CHECK_VALUE(a.A.has_value() && a.B.has_value(), "A and B must be given where there is no pattern");
    TORCH_CHECK_VALUE(a.A->dim() == 3 && a.A->size(0) == r && a.A->size(1) == 1 && a.A->size(2) >= m,
                      "A must have shape [r, 1, >= m] = [", r, ", 1, >= ", m, "], got ", a.A->sizes());
    TORCH_CHECK_VALUE(a.B->dim() == 3 && a.B->size(0) >= M && a.B->size(1) >= n && a.B->size(2) == r,
                      "B must have shape [>= M, >= n, r] = [>= ", M, ", >= ", n, ", ", r, "], got ", a.B->sizes());
    check_tensor(*a.A, "A", a.x);
    check_tensor(*a.B, "B", a.x);
  } else {
    if (is_packed(a.pattern))
      check_packed(a.pattern, r, n, m, M, a.x);
    else
      check_pattern(a.pattern, a.lambda, a.gamma, M);
  }
  TORCH_CHECK_VALUE(a.dropout >= 0 && a.dropout < 1, "dropout must be at least 0 and below 1, got ", a.dropout);
  TORCH_CHECK_VALUE(a.dropout == 0 || a.seed.has_value(), "dropout needs a seed");
  if (a.dropout > 0) check_dropout(a.x, *a.seed, a.dropout);
  TORCH_CHECK_VALUE(a.strategy != Strategy::merged || (a.dropout == 0 && a.weight.has_value()),
                    "the merged strategy needs the base weight and takes no dropout");
  TORCH_CHECK_VALUE(a.workspace >= 0, "workspace must be 0 (no limit) or a number of bytes, got ", a.workspace);
}

at::ScalarType product_dtype(const at::Tensor& x, at::ScalarType dtype) {
  if (!x.is_cpu() || c10::elementSize(dtype) > 2) return dtype;
  static const bool bf16 = multiplies("mkldnn::_is_mkldnn_bf16_supported"),
                    fp16 = multiplies("mkldnn::_is_mkldnn_fp16_supported");
  return (dtype == at::kBFloat16 ? bf16 : fp16) ? dtype : at::kFloat;
}

bool unpacks(const LayerArguments& a) {
  return is_packed(a.pattern) && (a.strategy == Strategy::factored || is_unpacked(a.pattern, a.x.device()));
}

int64_t rows_per_chunk(const LayerArguments& a, int64_t tokens) {
  const int64_t r = a.lambda.size(0), n = a.lambda.size(1), m = a.gamma.size(1);
  const int64_t M = std::max(a.x.size(-1), a.out_features);
  const bool unpacked = unpacks(a);
  if (a.workspace == 0) return unpacked ? unpacked_rows(r, n, M, a.dtype, a.x.device()) : r;
  // Per row k: n rows of S2 and of its fp32 gradient; factored: n columns of h and of its gradient; unpacked: of B2.
  const int64_t element = int64_t(c10::elementSize(a.dtype));
  const int64_t hidden = a.strategy == Strategy::factored ? 2 * tokens * element : 0;
  const int64_t bytes = n * (m * (element + std::max<int64_t>(4, element)) + hidden + (unpacked ? M * element : 0));
  return std::clamp<int64_t>(a.workspace / bytes, 1, r);
}

}  // namespace randlora
