// Random bases on CUDA. One thread makes four elements from one Philox counter and stores them at once; threads walk
// down axis 0, so that finding (x1, quad) costs one division per thread and not one per store.
#include "bases.h"

#include <algorithm>

#include <torch/library.h>

#include "cuda/launch.cuh"

namespace randlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;
constexpr int64_t kBlocksWanted = 4096;  // some 30 per multiprocessor of an H100: enough to even out the tail

template <class T, class Element>
__global__ void __launch_bounds__(kThreads)
    fill_kernel(T* __restrict__ out /* [size0, size1, size2] */, BaseSlice s, Element element, bool vector) {
  const int64_t quads = s.quads_per_row();
  const int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= s.size1 * quads) return;
  const int64_t x1 = t / quads, quad = t - x1 * quads;
  const int64_t lead = s.start2 % 4;
  const int64_t column = 4 * quad - lead;  // negative where the slice starts inside a counter
  T* row = out + x1 * s.stride1;
  for (int64_t x0 = blockIdx.y; x0 < s.size0; x0 += gridDim.y) {
    const Philox4 words = base_words(s.start2 / 4 + uint32_t(quad), s.start1 + uint32_t(x1), s.start0 + uint32_t(x0),
                                     s.stream, s.key0, s.key1);
    T* const to = row + x0 * s.stride0 + column;
    Pack<T, 4> pack;
#pragma unroll
    for (int e = 0; e < 4; ++e) pack.v[e] = static_cast<T>(element(words.v[e]));
    if (vector && column + 4 <= s.size2) {
      store_whole(to, pack);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (column + e >= 0 && column + e < s.size2) to[e] = pack.v[e];
    }
  }
}

template <class T, class Element>
void fill(const at::Tensor& out, const BaseSlice& s, const Element& element) {
  const int64_t blocks = divide_up(s.size1 * s.quads_per_row(), kThreads);
  const int64_t rows = std::clamp<int64_t>(divide_up(kBlocksWanted, blocks), 1, std::min(s.size0, kMaxGridY));
  const bool vector = s.start2 % 4 == 0 && can_pack<T, 4>(out.const_data_ptr(), {s.stride0, s.stride1});
  launch(fill_kernel<T, Element>, {blocks, rows}, kThreads, out.mutable_data_ptr<T>(), s, element, vector);
}

template <class Element>
void fill_any(const at::Tensor& out, const BaseSlice& s, const Element& element) {
  if constexpr (!std::is_same_v<Element, DenseElement>)
    if (out.scalar_type() == at::kChar) return fill<int8_t>(out, s, element);
  with_float_type(out.scalar_type(), [&](auto number) {
    fill<decltype(number)>(out, s, element);
  });
}

void fill_bases_(const at::Tensor& out, int64_t seed, int64_t stream, c10::IntArrayRef offsets,
                 std::optional<double> sparsity) {
  const BaseSlice slice = make_base_slice(out, seed, stream, offsets, sparsity);
  if (out.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(out.device());
  if (slice.is_signs())
    fill_any(out, slice, SignElement{});
  else if (sparsity.has_value())
    fill_any(out, slice, TernaryElement{ternary_threshold(*sparsity)});
  else
    fill_any(out, slice, DenseElement{});
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, CUDA, m) { m.impl("fill_bases_", &fill_bases_); }

}  // namespace randlora::cuda
