// Packed ternary bases made dense on CUDA, for the tensor cores.
#include "packed_update.h"

#include <algorithm>
#include <tuple>

#include <torch/library.h>

#include "cuda/launch.cuh"

namespace randlora::cuda {
namespace {

constexpr int kPacks = 32, kRows = 8;  // of a block: packs along a row, rows
constexpr int64_t kMaxGridY = 65535;

// out [rows, length] from bits [rows, planes, words]. A thread makes N neighbouring elements, which lie in one word as
// N divides 16, and stores them at once; a warp's stores are consecutive. Threads walk down the rows.
template <class T, int N>
__global__ void __launch_bounds__(kPacks* kRows)
    expand_bits(T* __restrict__ out, int64_t rows, int64_t length, const int16_t* __restrict__ bits, int64_t planes,
                int64_t words) {
  const int64_t e = (int64_t(blockIdx.x) * kPacks + threadIdx.x) * N;
  if (e >= length) return;
  const int shift = int(e % 16);
  for (int64_t row = int64_t(blockIdx.y) * kRows + threadIdx.y; row < rows; row += int64_t(gridDim.y) * kRows) {
    const int16_t* const word = bits + row * planes * words + e / 16;
    const uint32_t minus = uint32_t(uint16_t(word[(planes - 1) * words])) >> shift;
    const uint32_t plus = planes == 1 ? ~minus : uint32_t(uint16_t(word[0])) >> shift;
    Pack<T, N> pack;
#pragma unroll
    for (int l = 0; l < N; ++l) pack.v[l] = static_cast<T>(float(int(plus >> l & 1u) - int(minus >> l & 1u)));
    if constexpr (N > 1)
      store_whole(out + row * length + e, pack);
    else
      out[row * length + e] = pack.v[0];
  }
}

// The entries of row first + blockIdx.x of A into out [rows, m], zeros.
template <class T>
__global__ void expand_lists(T* __restrict__ out, PackedPattern s, int64_t first) {
  const int64_t k = first + blockIdx.x;
  for (int i = s.a_starts[k] + int(threadIdx.x); i < s.a_starts[k + 1]; i += int(blockDim.x)) {
    const int j = s.a_entries[i] >> 1;
    if (j < s.m) out[int64_t(blockIdx.x) * s.m + j] = static_cast<T>(s.a_entries[i] & 1 ? -1.0f : 1.0f);
  }
}

template <class T>
void launch_bits(const at::Tensor& out, int64_t length, const int16_t* bits, int64_t planes, int64_t words) {
  T* const data = out.mutable_data_ptr<T>();
  const int64_t rows = out.size(0);
  const auto with_packs = [&](auto packed) {
    constexpr int N = decltype(packed)::value;
    const Grid grid{divide_up(divide_up(length, N), kPacks), std::min(divide_up(rows, kRows), kMaxGridY)};
    launch(expand_bits<T, N>, grid, dim3(kPacks, kRows), data, rows, length, bits, planes, words);
  };
  // Where rows are aligned, their length is a multiple of a pack's.
  if (can_pack<T, kVec<T>>(data, {length}))
    with_packs(std::integral_constant<int, kVec<T>>{});
  else
    with_packs(std::integral_constant<int, 1>{});
}

template <class T>
void expand(const Expansion& e) {
  const PackedPattern& s = e.s;
  if (s.a_planes != nullptr) {
    launch_bits<T>(e.A, s.m, s.a_planes + e.first * s.planes * s.a_words, s.planes, s.a_words);
  } else {
    T* const a = e.A.zero_().template mutable_data_ptr<T>();
    launch(expand_lists<T>, {e.rows}, 256, a, s, e.first);
  }
  launch_bits<T>(e.B2t, s.M, s.b_planes + e.first * s.n * s.planes * s.words, s.planes, s.words);
}

std::tuple<at::Tensor, at::Tensor> packed_expand(at::TensorList pattern, int64_t n, int64_t m, int64_t M,
                                                 at::ScalarType dtype, int64_t first, std::optional<int64_t> rows) {
  const Expansion e = make_expansion(pattern, n, m, M, dtype, first, rows);
  const c10::cuda::CUDAGuard guard(e.A.device());
  with_float_type(dtype, [&](auto type) {
    expand<decltype(type)>(e);
  });
  return {e.A, e.B2t};
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, CUDA, m) {
  m.impl("packed_expand", &packed_expand);
  m.impl("sparse_update", &unpacked_update);
  m.impl("sparse_update_backward", &unpacked_update_backward);
}

}  // namespace randlora::cuda
