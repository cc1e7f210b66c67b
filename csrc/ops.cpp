// The schemas of torch.ops.randlora.*. Implementations stand at the end of cpu/<op>.cpp and cuda/<op>.cu; fake kernels,
// autograd and vmap in randlora/ops.py.
#include <torch/library.h>

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
}
