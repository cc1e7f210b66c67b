// The update of Hadamard bases, by fast transforms. With W(x, y) = (-1)^popcount(x & y), P = n r, R = 2^ceil(log2 r),
// column j in group g = (j / w) mod R, and signs a, b, c:
//
//   A[k, 0, j] = a_j W(k, g)        B2[o, p] = b_o c_p W(o, p)
//
// The pattern is signs (pattern.h): (a, b, c, width). The first three are int32 words with a bit for each of at least
// m, M and P signs: bit x % 32 of word x / 32 is 1 where sign x is -1. `width` is an empty int8 tensor of shape [w, 0]:
// w (1, 2, 4 or 8) is read from its shape, without waiting for a device. The narrow side of a layer has m = min(in,
// out) features, the wide side M = max(in, out).
//
//   up     u[t,g,i] = sum of a_j gamma[i,j] x[t,j] over the columns j of g      v[t,k,i] = sum_g W(k,g) u[t,g,i]
//          h[t,p] = scale c_p lambda[k,i] v[t,k,i], p = k n + i                 y[t,o] += b_o sum_p W(o,p) h[t,p]
//   down   the adjoint:  z[t,p] = c_p sum_o W(p,o) b_o x[t,o]     du[t,g,i] = sum_k W(k,g) scale lambda[k,i] z[t,k,i]
//          y[t,j] += a_j sum_i gamma[i,j] du[t,g,i]
//   and    dlambda[k,i] = scale sum_t v[t,k,i] z[t,k,i]           dgamma[i,j] = a_j sum_t x[t,j] du[t,g,i]
//
// randlora::hadamard_up_(Tensor(a!) out, Tensor x, Tensor[] pattern, Tensor randlora_lambda, Tensor randlora_gamma,
//                        float scale) -> ()
//     out [T, M] += the update of x [T, m]: y where in <= out, dx where in > out.
// randlora::hadamard_down_, the same: out [T, m] += the update of x [T, M]: y where in > out, dx where in <= out.
// randlora::hadamard_gradients(Tensor narrow, Tensor wide, Tensor(a!)? into_narrow, Tensor(b!)? into_wide,
//                              Tensor[] pattern, Tensor randlora_lambda, Tensor randlora_gamma, float scale)
//                              -> (Tensor, Tensor)
//     dlambda and dgamma in fp32 (fp64 for fp64), from x and dy: narrow [T, m] and wide [T, M]. In the same pass,
//     into_narrow [T, m] += down(wide) or into_wide [T, M] += up(narrow), if it is given; at most one may be.
// randlora::hadamard_update(Tensor[] pattern, Tensor randlora_lambda, Tensor randlora_gamma, int max_dim, float scale,
//                           Tensor? weight, ScalarType dtype) -> Tensor
//     D [m, M], whose row j is what up() gives for the unit vector j: dW^T where in <= out and dW otherwise. With a
//     weight, weight + D in the weight's layout, one stride of which is 1.
// randlora::hadamard_update_backward(Tensor grad, Tensor[] pattern, Tensor randlora_lambda, Tensor randlora_gamma,
//                                    float scale, bool need_lambda, bool need_gamma) -> (Tensor, Tensor)
//     From the gradient of D, [m, M] in fp32 or fp64; results in the parameters' dtypes.
//
// Tokens are contiguous and have one dtype. Sums are fp32 (fp64 for fp64) and rounded once into the result. Work memory
// does not depend on T, and results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <optional>

#include <ATen/core/Tensor.h>

#include "dtypes.h"
#include "update.h"

namespace randlora {

// Signs as kernels read them, for one layer.
struct HadamardShape : LayerSizes {
  const int32_t *a = nullptr, *b = nullptr, *c = nullptr;  // sign bits
  int64_t P = 0, R = 0;
  int64_t width = 0;    // w
  int64_t columns = 0;  // of the largest group: w * ceil(m / (w R))
};

// Checks what is the same for layers of any size (ValueError, TypeError).
void check_signs(at::TensorList pattern, at::Device device);

// Checks the pattern and the parameters of a layer (ValueError, TypeError).
HadamardShape check_hadamard(at::TensorList pattern, const at::Tensor& lambda, const at::Tensor& gamma, int64_t M);

// The same, and the tokens: up writes to `wide`, down to `narrow`, and gradients reads both.
HadamardShape check_hadamard_tokens(const at::Tensor& narrow, const at::Tensor& wide, at::TensorList pattern,
                                    const at::Tensor& lambda, const at::Tensor& gamma);
HadamardShape check_hadamard_gradients(const at::Tensor& narrow, const at::Tensor& wide,
                                       const std::optional<at::Tensor>& into_narrow,
                                       const std::optional<at::Tensor>& into_wide, at::TensorList pattern,
                                       const at::Tensor& lambda, const at::Tensor& gamma);

// The uninitialised result of hadamard_update on gamma's device, for `weight`, which is checked.
at::Tensor make_hadamard_update(const HadamardShape& s, const std::optional<at::Tensor>& weight,
                                const at::Tensor& gamma, at::ScalarType dtype);

// Checks the arguments of hadamard_update_backward.
HadamardShape check_hadamard_grad(const at::Tensor& grad, at::TensorList pattern, const at::Tensor& lambda,
                                  const at::Tensor& gamma);

}  // namespace randlora
