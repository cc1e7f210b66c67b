// What all updates dW have in common, whatever the form of the bases: the sizes of the layer, checks of its parameters
// and of tokens, and the matrix that an update is written to.
#pragma once

#include <cstdint>
#include <optional>

#include <ATen/core/Tensor.h>

namespace randlora {

// Of one layer: n bases of rank r, m = min(in, out), M = max(in, out).
struct LayerSizes {
  int64_t r, n, m, M;
};

// The sizes of a layer with these parameters, lambda [r, n] and gamma [n, m] (ValueError, TypeError).
LayerSizes check_parameters(const at::Tensor& lambda, const at::Tensor& gamma, int64_t M);

// M, or m, of tokens [T, M] or [T, m] (ValueError).
int64_t features_of(const at::Tensor& tokens);

// Tokens of both sides of a layer, narrow [T, m] and wide [T, M]: contiguous, of one float type, on `device`
// (ValueError, TypeError).
void check_tokens(const at::Tensor& narrow, const at::Tensor& wide, const LayerSizes& layer, at::Device device);

// The same of one more tensor with these tokens and features, named in the error; `like` has the right dtype and
// device.
void check_tokens_like(const at::Tensor& t, const char* name, const at::Tensor& like, int64_t features);

// An uninitialised matrix for D (dW^T where in <= out, dW otherwise) in `dtype`. With `weight` [m, M], which is
// checked, for weight + D: all m rows, in the weight's layout, one stride of which is 1. Without it, for `rows` rows of
// D.
at::Tensor empty_update(const LayerSizes& layer, int64_t rows, const std::optional<at::Tensor>& weight,
                        const at::Tensor& gamma, at::ScalarType dtype);

// Checks a gradient of those rows, fp32 or fp64 (ValueError, TypeError).
void check_update_gradient(const at::Tensor& grad, const LayerSizes& layer, int64_t rows, const at::Tensor& gamma);

}  // namespace randlora
