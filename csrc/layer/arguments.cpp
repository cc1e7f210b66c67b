#include "layer/arguments.h"

#include <algorithm>
#include <charconv>
#include <limits>

#include <c10/util/Exception.h>

#include "dropout.h"
#include "dtypes.h"
#include "hadamard.h"
#include "packed_update.h"
#include "pattern.h"
#include "seed.h"
#include "sizes.h"
#include "sparse_update.h"

namespace randlora {
namespace {

// `t` is a strided tensor of floats where x is.
void check_tensor(const at::Tensor& t, const char* name, const at::Tensor& x) {
  check_float(t, name);
  TORCH_CHECK_VALUE(t.layout() == at::kStrided && t.device() == x.device(), name,
                    " must be a strided tensor on the device of x, ", x.device(), ", got ", t.layout(), " on ",
                    t.device());
}

void check_base_layer(const LayerArguments& a) {
  const int64_t in = a.x.size(-1), out = a.out_features;
  if (a.weight.has_value()) {
    const at::Tensor& w = *a.weight;
    const int64_t in_axis = a.weight_is_transposed ? 0 : 1;
    TORCH_CHECK_VALUE(w.dim() == 2 && w.size(in_axis) == in && w.size(1 - in_axis) == out, "weight must have shape ",
                      a.weight_is_transposed ? "[in, out]" : "[out, in]", " with in = ", in, " as in x ", a.x.sizes(),
                      " and out = ", out, ", got ", w.sizes());
  }
  TORCH_CHECK_VALUE(!a.bias.has_value() || (a.bias->dim() == 1 && a.bias->size(0) == out && a.weight.has_value()),
                    "bias must have shape [out] = [", out, "] and come with a weight");
}

void check_dense_bases(const LayerArguments& a, const LayerSizes& layer) {
  TORCH_CHECK_VALUE(a.A.has_value() && a.B.has_value(), "A and B must be given where there is no pattern");
  const at::Tensor &A = *a.A, &B = *a.B;
  TORCH_CHECK_VALUE(A.dim() == 3 && A.size(0) == layer.r && A.size(1) == 1 && A.size(2) >= layer.m,
                    "A must have shape [r, 1, >= m] = [", layer.r, ", 1, >= ", layer.m, "], got ", A.sizes());
  TORCH_CHECK_VALUE(B.dim() == 3 && B.size(0) >= layer.M && B.size(1) >= layer.n && B.size(2) == layer.r,
                    "B must have shape [>= M, >= n, r] = [>= ", layer.M, ", >= ", layer.n, ", ", layer.r, "], got ",
                    B.sizes());
  check_tensor(A, "A", a.x);
  check_tensor(B, "B", a.x);
}

void check_bases(const LayerArguments& a, const LayerSizes& layer) {
  if (a.pattern.empty())
    check_dense_bases(a, layer);
  else if (is_signs(a.pattern))
    check_hadamard(a.pattern, a.lambda, a.gamma, layer.M);
  else if (is_packed(a.pattern))
    check_packed(a.pattern, layer, a.x);
  else if (is_seed(a.pattern))
    check_seed(a.pattern, a.x.device());
  else
    check_lists_of_layer(a.pattern, a.lambda, a.gamma, layer.M);
}

void check_options(const LayerArguments& a) {
  TORCH_CHECK_VALUE(a.dropout >= 0 && a.dropout < 1, "dropout must be at least 0 and below 1, got ", a.dropout);
  TORCH_CHECK_VALUE(a.dropout == 0 || a.seed.has_value(), "dropout needs a seed");
  if (a.dropout > 0) check_dropout(a.x, *a.seed, a.dropout);
  TORCH_CHECK_VALUE(
      parse_strategy(a.strategy, tokens_of(a.x)) != Strategy::merged || (a.dropout == 0 && a.weight.has_value()),
      "the merged strategy needs the base weight and takes no dropout");
  TORCH_CHECK_VALUE(a.workspace >= 0, "workspace must be 0 (no limit) or a number of bytes, got ", a.workspace);
}

}  // namespace

void check(const LayerArguments& a) {
  TORCH_CHECK_VALUE(a.x.dim() >= 1, "x must have shape [..., in], got a tensor without dimensions");
  check_float(a.dtype, "dtype");
  check_tensor(a.x, "x", a.x);
  check_tensor(a.lambda, "randlora_lambda", a.x);
  check_tensor(a.gamma, "randlora_gamma", a.x);
  if (a.weight.has_value()) check_tensor(*a.weight, "weight", a.x);
  if (a.bias.has_value()) check_tensor(*a.bias, "bias", a.x);
  const int64_t in = a.x.size(-1), out = a.out_features, m = std::min(in, out), M = std::max(in, out);
  check_size("in features", in);
  check_size("out features", out);
  check_base_layer(a);
  TORCH_CHECK_VALUE(a.lambda.dim() == 2 && a.lambda.numel() > 0, "randlora_lambda must have shape [r, n], got ",
                    a.lambda.sizes());
  const int64_t r = a.lambda.size(0), n = a.lambda.size(1);
  check_size("r", r);
  check_size("n", n);
  TORCH_CHECK_VALUE(a.gamma.dim() == 2 && a.gamma.size(0) == n && a.gamma.size(1) == m,
                    "randlora_gamma must have shape [n, m] = [", n, ", ", m, "], got ", a.gamma.sizes());
  check_bases(a, {r, n, m, M});
  check_options(a);
}

void check_grad(const at::Tensor& grad, const LayerArguments& a) {
  TORCH_CHECK_VALUE(grad.dim() == a.x.dim() && grad.dim() >= 1 &&
                        grad.sizes().slice(0, grad.dim() - 1) == a.x.sizes().slice(0, a.x.dim() - 1),
                    "grad must have shape [..., out] with the leading shape of x ", a.x.sizes(), ", got ",
                    grad.sizes());
  check_tensor(grad, "grad", a.x);
}

int64_t tokens_of(const at::Tensor& x) {
  int64_t tokens = 1;
  for (int64_t axis = 0; axis + 1 < x.dim(); ++axis) tokens *= x.size(axis);
  return tokens;
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

}  // namespace randlora
