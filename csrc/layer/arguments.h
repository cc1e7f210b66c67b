// A whole RandLoRA layer, y = x W^T + bias + dropout(x) dW^T, as the ops linear and linear_backward: their arguments by
// name. How a layer is computed stands in layer.h.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

#include <ATen/core/Tensor.h>

namespace randlora {

// The arguments of both ops, not checked yet. A backward has no bias.
struct LayerArguments {
  at::Tensor x;                      // [..., in]
  std::optional<at::Tensor> weight;  // [out, in], or [in, out] if weight_is_transposed; none: the update alone
  std::optional<at::Tensor> bias;    // [out]
  std::optional<at::Tensor> A;       // [r, 1, >= m]
  std::optional<at::Tensor> B;       // [>= M, >= n, r]
  at::Tensor lambda, gamma;          // [r, n], [n, m]
  at::TensorList pattern;            // in place of A and B: see pattern.h
  std::optional<at::Tensor> seed;    // [1] int64, of the dropout mask
  int64_t out_features = 0;
  double scale = 1;
  at::ScalarType dtype = at::kFloat;             // of y
  std::string_view strategy, backward_strategy;  // names or plans: see parse_strategy
  double dropout = 0;                            // probability; 0: none
  bool weight_is_transposed = false;
  int64_t workspace = 0;  // bytes that temporaries may take, 0: no limit
};

// Which gradients a backward is asked for.
struct Needed {
  bool x, lambda, gamma;

  bool parameters() const { return lambda || gamma; }
};

using LayerGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // of x, lambda and gamma

// Throws ValueError / TypeError unless the arguments describe one layer.
void check(const LayerArguments& a);
// Throws them unless grad is a gradient of the y of that layer.
void check_grad(const at::Tensor& grad, const LayerArguments& a);

int64_t tokens_of(const at::Tensor& x);

// How the update is computed; all three are exact in exact arithmetic. With S2 [P, m] and B2 [M, P] (design: P = n *
// r):
//   factored      through h = x @ S2^T: products over the tokens only
//   materialized  through dW = B2 @ S2: one product without tokens, one with
//   merged        through W + dW: one product without tokens, and the base product itself; no dropout
enum class Strategy { factored, materialized, merged };

// The strategy for this many tokens that a name means, or a plan: "factored<340,merged" is factored below 340 tokens
// and merged from there on. A plan lets one traced graph serve all sizes. ValueError for anything else.
Strategy parse_strategy(std::string_view plan, int64_t tokens);

}  // namespace randlora
