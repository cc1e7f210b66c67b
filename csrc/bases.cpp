#include "bases.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include "dtypes.h"

namespace randlora {
namespace {

// Whether no two elements can be the same memory, as those of expanded tensors are: ordered by stride, each axis steps
// over all that the ones before it reach.
bool is_apart(const at::Tensor& t) {
  std::array<int, 3> axes{0, 1, 2};
  std::sort(axes.begin(), axes.end(), [&](int a, int b) {
    return t.stride(a) < t.stride(b);
  });
  int64_t reach = 1;
  for (const int axis : axes) {
    if (t.size(axis) == 1) continue;
    if (t.stride(axis) < reach) return false;
    reach += (t.size(axis) - 1) * t.stride(axis);
  }
  return true;
}

}  // namespace

uint32_t ternary_threshold(double sparsity) {
  TORCH_CHECK_VALUE(sparsity >= 1.0 && sparsity <= 2147483648.0,
                    "sparsity must lie between 1 (no zeros) and 2^31, got ", sparsity);
  return uint32_t(std::floor(4294967296.0 / (2.0 * sparsity)));
}

BaseSlice make_base_slice(const at::Tensor& out, int64_t seed, int64_t stream, c10::IntArrayRef offsets,
                          std::optional<double> sparsity) {
  const bool signs = stream >= 3 && stream <= 5, int8 = signs || sparsity.has_value();
  TORCH_CHECK_VALUE(stream == 0 || stream == 1 || signs,
                    "stream must be 0 (A), 1 (B), or 3, 4 or 5 (the signs of Hadamard bases), got ", stream);
  TORCH_CHECK_VALUE(!signs || !sparsity.has_value(), "signs have no zeros, got sparsity ", sparsity.value_or(0));
  TORCH_CHECK_TYPE(is_float(out.scalar_type()) || (int8 && out.scalar_type() == at::kChar),
                   "out must be float64, float32, bfloat16 or float16", int8 ? " or int8" : "",
                   int8 ? "" : " (int8 holds ternary bases only: give a sparsity)", ", got ", out.scalar_type());
  TORCH_CHECK_VALUE(out.dim() == 3, "out must have 3 dimensions (A: [r, 1, m], B: [M, n, r]), got shape ", out.sizes());
  TORCH_CHECK_VALUE(out.stride(2) == 1 || out.size(2) <= 1, "out must be contiguous along its last axis, got strides ",
                    out.strides());
  TORCH_CHECK_VALUE(out.numel() == 0 || is_apart(out),
                    "out must have an element of memory for each of its elements, got shape ", out.sizes(),
                    " and strides ", out.strides(), ": fill a contiguous tensor and expand that");
  TORCH_CHECK_VALUE(!out.requires_grad() || !c10::GradMode::is_enabled(),
                    "out requires a gradient, and what writes into it has none: use torch.no_grad()");
  TORCH_CHECK_VALUE(offsets.size() == 3, "offsets must be 3 integers, one per axis of out, got ", offsets);
  TORCH_CHECK_VALUE(stream == 1 || (out.size(1) <= 1 && offsets[1] == 0), signs ? "a vector of signs has" : "A has",
                    " one element along its middle axis, got size ", out.size(1), " at offset ", offsets[1]);
  TORCH_CHECK_VALUE(!signs || (out.size(0) <= 1 && offsets[0] == 0),
                    "a vector of signs has one element along its first axis, got size ", out.size(0), " at offset ",
                    offsets[0]);
  for (int axis = 0; axis < 3; ++axis) {
    TORCH_CHECK_VALUE(offsets[axis] >= 0, "offsets must not be negative, got ", offsets);
    TORCH_CHECK_VALUE(offsets[axis] <= int64_t{std::numeric_limits<int32_t>::max()} - out.size(axis),
                      "a base has at most 2^31 - 1 elements along an axis, got offset ", offsets[axis], " and size ",
                      out.size(axis), " along axis ", axis);
  }
  out.unsafeGetTensorImpl()->bump_version();  // autograd tells by it that what it has kept was written to
  BaseSlice slice{};
  slice.size0 = out.size(0);
  slice.size1 = out.size(1);
  slice.size2 = out.size(2);
  slice.stride0 = out.stride(0);
  slice.stride1 = out.stride(1);
  slice.start0 = uint32_t(offsets[0]);
  slice.start1 = uint32_t(offsets[1]);
  slice.start2 = uint32_t(offsets[2]);
  slice.key0 = uint32_t(uint64_t(seed));
  slice.key1 = uint32_t(uint64_t(seed) >> 32);
  slice.stream = Stream(stream);
  return slice;
}

}  // namespace randlora
