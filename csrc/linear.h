// A whole RandLoRA layer, y = x W^T + bias + dropout(x) dW^T, as one op (schemas in ops.cpp, strategies in linear.cpp).
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include <ATen/core/Tensor.h>

namespace randlora {

// How the update is computed; all three are exact in exact arithmetic. With S2 [P, m] and B2 [M, P] (design: P = n *
// r):
//   factored      through h = x @ S2^T: products over the tokens only
//   materialized  through dW = B2 @ S2: one product without tokens, one with
//   merged        through W + dW: one product without tokens, and the base product itself; no dropout
enum class Strategy { factored, materialized, merged };

struct LayerArguments {
  at::Tensor x;                      // [..., in]
  std::optional<at::Tensor> weight;  // [out, in], or [in, out] if weight_is_transposed; none: the update alone
  std::optional<at::Tensor> bias;    // [out]
  std::optional<at::Tensor> A;       // [r, 1, >= m]
  std::optional<at::Tensor> B;       // [>= M, >= n, r]
  at::Tensor lambda, gamma;          // [r, n], [n, m]
  int64_t out_features;
  double scale;
  at::ScalarType dtype;  // of the products and of y
  Strategy strategy;
  double dropout;                  // probability; 0: none
  std::optional<at::Tensor> seed;  // [1] int64, of the dropout mask
  bool weight_is_transposed;
  int64_t workspace;                // bytes that temporaries may take, 0: no limit
  std::vector<at::Tensor> pattern;  // in place of A and B: see sparse_update.h, packed_update.h, hadamard.h
};

// The strategy for this many tokens that a name means, or a plan: "factored<340,merged" is factored below 340 tokens
// and merged from there on. A plan lets one traced graph serve all sizes.
Strategy parse_strategy(std::string_view plan, int64_t tokens);
int64_t tokens_of(const at::Tensor& x);

// Throws ValueError / TypeError unless `t` is a strided tensor of floats where x is.
void check_tensor(const at::Tensor& t, const char* name, const at::Tensor& x);

// Throws ValueError / TypeError unless the arguments describe one layer.
void check(const LayerArguments& a);

// Whether packed bases are made dense for this call.
bool unpacks(const LayerArguments& a);

// The dtype to compute in: fp32 for 16 bits on CPUs without products for them, where PyTorch's own loops take ten to a
// hundred times as long as casting and an fp32 product do.
at::ScalarType product_dtype(const at::Tensor& x, at::ScalarType dtype);

// Rows k of A (all their bases) that are worked on at a time, so that temporaries stay below `workspace`.
int64_t rows_per_chunk(const LayerArguments& a, int64_t tokens);

}  // namespace randlora
