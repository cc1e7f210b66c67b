#include "unique_base.h"

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include "dtypes.h"

namespace randlora {
namespace {

void check_tensor(const at::Tensor& t, const char* name, const char* shape, int64_t dim, const at::Device& device) {
  check_float(t, name);
  TORCH_CHECK_VALUE(t.dim() == dim, name, " must have shape ", shape, ", got ", t.sizes());
  TORCH_CHECK_VALUE(t.numel() > 0, name, " must not be empty, got shape ", t.sizes());
  TORCH_CHECK_VALUE(t.device() == device, name, " must be on the device of A, ", device, ", got ", t.device());
}

}  // namespace

UniqueBaseShape check_unique_base(const at::Tensor& A, const at::Tensor& lambda, const at::Tensor& gamma) {
  TORCH_CHECK_TYPE(A.defined(), "A must be a tensor [r, 1, m], got None");
  check_tensor(A, "A", "[r, 1, m]", 3, A.device());
  TORCH_CHECK_VALUE(A.size(1) == 1, "A must have shape [r, 1, m], got ", A.sizes());
  check_tensor(lambda, "randlora_lambda", "[r, n]", 2, A.device());
  check_tensor(gamma, "randlora_gamma", "[n, m]", 2, A.device());
  const UniqueBaseShape shape{A.size(0), lambda.size(1), A.size(2)};
  TORCH_CHECK_VALUE(lambda.size(0) == shape.r, "randlora_lambda must have shape [r, n] with r = ", shape.r, " as in A ",
                    A.sizes(), ", got ", lambda.sizes());
  TORCH_CHECK_VALUE(gamma.size(0) == shape.n && gamma.size(1) == shape.m, "randlora_gamma must have shape [n, m] = [",
                    shape.n, ", ", shape.m, "] to match A ", A.sizes(), " and randlora_lambda ", lambda.sizes(),
                    ", got ", gamma.sizes());
  return shape;
}

void check_unique_base_grad(const at::Tensor& grad, const at::Tensor& A, UniqueBaseShape shape) {
  check_tensor(grad, "grad", "[r, n, m]", 3, A.device());
  TORCH_CHECK_VALUE(grad.size(0) == shape.r && grad.size(1) == shape.n && grad.size(2) == shape.m,
                    "grad must have shape [r, n, m] = [", shape.r, ", ", shape.n, ", ", shape.m, "], got ",
                    grad.sizes());
}

at::ScalarType unique_base_dtype(const at::Tensor& A, const at::Tensor& lambda, const at::Tensor& gamma,
                                 std::optional<at::ScalarType> dtype) {
  const at::ScalarType type =
      dtype.value_or(c10::promoteTypes(A.scalar_type(), c10::promoteTypes(lambda.scalar_type(), gamma.scalar_type())));
  check_float(type, "dtype");
  return type;
}

at::ScalarType accumulate_type(const at::Tensor& A, const at::Tensor& lambda, const at::Tensor& gamma,
                               at::ScalarType result) {
  const bool fp64 = result == at::kDouble || A.scalar_type() == at::kDouble || lambda.scalar_type() == at::kDouble ||
                    gamma.scalar_type() == at::kDouble;
  return fp64 ? at::kDouble : at::kFloat;
}

}  // namespace randlora
