// Hadamard bases on CUDA: u = x gamma^T and out += du gamma of 16-bit tokens, on tensor cores.
#include "cuda/hadamard_tiles.cuh"

#include <algorithm>

namespace randlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kResults = 32;      // of a token, that a warp has at a time
constexpr int kImage = 32 << 10;  // elements of gamma that a block holds, at most

struct ProductTiles {
  int groups, inner;  // of a block; inner is padded to a multiple of 16
  int outer;          // results of a token and group, a multiple of kResults
  int group_blocks, outer_blocks, parts;
};

// The n-th of 32 results of a warp is column `place` of the product: so that a thread has eight neighbours.
__device__ __forceinline__ int permuted(int n) { return (n & ~31) | (n & 6) << 2 | (n >> 2 & 6) | (n & 1); }

// The block's part of gamma [R, n_padded, K], zeros beyond it: up, rows are bases i, permuted, of columns; down, rows
// are bases of columns, permuted.
template <class T, bool kUp>
__device__ __forceinline__ void load_image(const HadamardLayout& l, const ProductTiles& t, T* image, const T* gamma,
                                           int first_group, int first) {
  const int columns = kUp ? t.inner : t.outer, rows = kUp ? t.outer : t.inner, units = columns / kUnit;
  for (int index = int(threadIdx.x); index < t.groups * rows * units; index += kThreads) {
    const int rest = index / units, unit = index - rest * units, g = rest / rows, row = rest - g * rows;
    const int i = kUp ? first + row : row, column = unit * kUnit + (kUp ? 0 : first);
    const Matrix<T> matrix(image + g * rows * columns, units);
    const bool valid = i < l.n_padded && column < l.K;
    const T* const from = gamma + (int64_t(first_group + g) * l.n_padded + i) * l.K + column;
    if constexpr (kUp) {
      copy_later(matrix.at(permuted(row), unit), valid ? from : gamma, valid);
    } else {
      Pack<uint32_t, 4> words{};
      if (valid) words = *reinterpret_cast<const Pack<uint32_t, 4>*>(from);
#pragma unroll
      for (int word = 0; word < 4; ++word)
        reinterpret_cast<uint32_t*>(matrix.at(row, (unit & ~3) + word))[unit & 3] = words.v[word];
    }
  }
}

// Blocks: group_blocks x outer_blocks x parts, whose tiles of tokens are `parts` apart. A warp: kTile tokens' results
// of kResults bases, or columns, of one group.
template <class T, bool kUp>
__global__ void __launch_bounds__(kThreads, 2)
    product_kernel(HadamardLayout l, ProductTiles t, const T* __restrict__ gamma, const T* __restrict__ from, T* to,
                   int64_t tokens) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int rest = int(blockIdx.x) / t.group_blocks, part = rest / t.outer_blocks;
  const int first_group = (int(blockIdx.x) - rest * t.group_blocks) * t.groups;
  const int first = (rest - part * t.outer_blocks) * t.outer;
  T* const image = launched_shared<T>();
  T* const stages = image + t.groups * t.outer * t.inner;
  const int stage_size = t.groups * kTile * t.inner, units = t.inner / kUnit, outer_units = t.outer / kUnit;
  const int64_t stride = kUp ? l.m : int64_t(l.n_padded) << l.log_R;
  const Copies copies = copies_of<kUp>(l, first_group, t.groups, t.inner);

  begin_tile(copies, stages, t.inner, from, stride, int64_t(part) * kTile, tokens);
  load_image<T, kUp>(l, t, image, gamma, first_group, first);
  end_copies();
  int stage = 0;
  for (int64_t token = int64_t(part) * kTile; token < tokens; token += int64_t(t.parts) * kTile, stage ^= 1) {
    const int64_t next = token + int64_t(t.parts) * kTile;
    if (next < tokens) begin_tile(copies, stages + (stage ^ 1) * stage_size, t.inner, from, stride, next, tokens);
    end_copies();
    wait_for_copies<1>();
    __syncthreads();
    const int warps_of_group = t.outer / kResults;
    for (int item = warp; item < t.groups * warps_of_group; item += kThreads / 32) {
      const int g = item / warps_of_group, part_of_outer = item - g * warps_of_group;
      const Matrix<T> a_matrix(stages + stage * stage_size + g * kTile * t.inner, units);
      const Matrix<T> b_matrix(image + g * t.outer * t.inner, kUp ? units : outer_units);
      // The eight results that the thread has of a token.
      const int result = first + part_of_outer * kResults + lane % 4 * kUnit;
      const int64_t column = ((int64_t(result / kUnit) << l.log_R) + first_group + g) * kUnit;
      const int64_t own = kUp ? int64_t(first_group + g) * l.n_padded + result : column;
      const int64_t row_size = kUp ? int64_t(l.n_padded) << l.log_R : l.m;
      const bool valid = kUp ? result < l.n_padded : column < l.m;
      Pack<T, kUnit> before[4];
      if constexpr (!kUp) {
#pragma unroll
        for (int row = 0; row < 4; ++row) {
          const int64_t at = token + row * 8 + lane / 4;
          if (valid && at < tokens) before[row] = *reinterpret_cast<const Pack<T, kUnit>*>(to + at * row_size + own);
        }
      }
      float c[2][4][4] = {};
#pragma unroll 2
      for (int unit = 0; unit < units; unit += 2) {
        uint32_t a[2][4], b[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          load_matrices<false>(a[half], a_matrix.at(half * 16 + lane % 16, unit + lane / 16));
          const int first_result = part_of_outer * kResults + half * 16;
          if constexpr (kUp)
            load_matrices<false>(b[half], b_matrix.at(first_result + lane / 16 * 8 + lane % 8, unit + lane / 8 % 2));
          else
            load_matrices<true>(b[half], b_matrix.at(unit * kUnit + lane % 16, first_result / kUnit + lane / 16));
        }
#pragma unroll
        for (int row = 0; row < 2; ++row)
#pragma unroll
          for (int n = 0; n < 4; ++n) multiply_add<T>(c[row][n], a[row], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
#pragma unroll
      for (int row = 0; row < 4; ++row) {
        const int64_t at = token + row * 8 + lane / 4;
        if (!valid || at >= tokens) continue;
        Pack<T, kUnit> pack;
#pragma unroll
        for (int e = 0; e < kUnit; ++e) {
          float value = c[row / 2][e / 2][row % 2 * 2 + e % 2];
          if constexpr (!kUp) value += static_cast<float>(before[row].v[e]);
          pack.v[e] = static_cast<T>(value);
        }
        store_whole(to + at * row_size + own, pack);
      }
    }
    __syncthreads();  // the next tile but one overwrites the stage
  }
}

template <class T, bool kUp>
void product(const HadamardLayout& l, const T* gamma, const T* from, T* to, int64_t tokens) {
  ProductTiles t;
  const int results = padded(kUp ? l.n_padded : l.K, kResults);
  t.inner = padded(kUp ? l.K : l.n_padded, 16);
  t.groups = groups_of(l, t.inner);
  t.outer = std::min(results, kImage / (t.groups * t.inner) / kResults * kResults);
  t.group_blocks = (1 << l.log_R) / t.groups, t.outer_blocks = int(divide_up(results, t.outer));
  const int64_t blocks = int64_t(t.group_blocks) * t.outer_blocks, runs = divide_up(tokens, kTile * kTilesOfBlock);
  t.parts = int(std::min(runs, std::max<int64_t>(1, 2 * kMultiprocessors / blocks)));
  const int64_t shared = int64_t(t.groups) * t.inner * (t.outer + 2 * kTile) * int64_t(sizeof(T));
  launch(product_kernel<T, kUp>, {blocks * t.parts}, {kThreads, shared}, l, t, gamma, from, to, tokens);
}

}  // namespace

bool can_multiply_in_place(const HadamardLayout& l, std::initializer_list<const void*> tokens) {
  bool possible = l.log_w == 3 && l.m % kUnit == 0 && std::max(l.n_padded, l.K) <= kInner;
  for (const void* p : tokens) possible = possible && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  if (!possible) return false;
  int device = 0, major = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major >= 8;
}

template <class T>
void product_up(const HadamardLayout& l, T* u, const T* x, const T* gamma, int64_t tokens) {
  product<T, true>(l, gamma, x, u, tokens);
}

template <class T>
void product_down(const HadamardLayout& l, T* out, const T* du, const T* gamma, int64_t tokens) {
  product<T, false>(l, gamma, du, out, tokens);
}

#define RANDLORA_INSTANTIATE(T)                                                     \
  template void product_up(const HadamardLayout&, T*, const T*, const T*, int64_t); \
  template void product_down(const HadamardLayout&, T*, const T*, const T*, int64_t);
RANDLORA_INSTANTIATE(c10::BFloat16)
RANDLORA_INSTANTIATE(c10::Half)

}  // namespace randlora::cuda
