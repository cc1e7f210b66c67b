// Hadamard bases on CUDA: gamma's gradient, du^T x, of 16-bit tokens, on tensor cores.
#include "cuda/hadamard_tiles.cuh"

#include <algorithm>

namespace randlora::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kRows = 32, kColumns = 64;  // of the gradient of a group, that a warp has
constexpr int kStages = 3;

struct GammaTiles {
  int groups, bases, columns;  // of a block, both padded to multiples of 16
  int items;                   // pieces of kRows x kColumns of the block's groups; a warp has one
  int group_blocks, item_blocks, parts;
};

GammaTiles gamma_tiles(const HadamardLayout& l, int64_t tokens) {
  GammaTiles t;
  t.bases = padded(l.n_padded, 16), t.columns = padded(l.K, 16);
  t.groups = groups_of(l, std::max(t.bases, t.columns));
  t.items = t.groups * int(divide_up(t.bases, kRows) * divide_up(t.columns, kColumns));
  t.group_blocks = (1 << l.log_R) / t.groups, t.item_blocks = int(divide_up(t.items, kThreads / 32));
  const int64_t blocks = int64_t(t.group_blocks) * t.item_blocks;
  t.parts = int(std::min(divide_up(tokens, kTile * kTilesOfBlock), std::max<int64_t>(1, kMultiprocessors / blocks)));
  return t;
}

// Blocks: group_blocks x item_blocks x parts; partial [parts, R, n_padded, K] = or += each part's sum over its tokens.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    gamma_kernel(HadamardLayout l, GammaTiles t, float* partial, bool add, const T* __restrict__ x,
                 const T* __restrict__ du, int64_t tokens) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int rest = int(blockIdx.x) / t.group_blocks, part = rest / t.item_blocks;
  const int first_group = (int(blockIdx.x) - rest * t.group_blocks) * t.groups;
  const int item = (rest - part * t.item_blocks) * (kThreads / 32) + warp;
  const int across = (t.columns + kColumns - 1) / kColumns;
  const int of_group = across * ((t.bases + kRows - 1) / kRows), g = item / of_group;
  const int piece = item - g * of_group, i0 = piece / across * kRows, c0 = piece % across * kColumns;
  T* const stages = launched_shared<T>();
  const int bases_size = t.groups * kTile * t.bases, stage_size = bases_size + t.groups * kTile * t.columns;
  const Copies of_du = copies_of<false>(l, first_group, t.groups, t.bases);
  const Copies of_x = copies_of<true>(l, first_group, t.groups, t.columns);
  const int64_t step = int64_t(t.parts) * kTile;
  const auto begin = [&](int stage, int64_t token) {
    if (token < tokens) {
      T* const tile = stages + stage * stage_size;
      begin_tile(of_du, tile, t.bases, du, int64_t(l.n_padded) << l.log_R, token, tokens);
      begin_tile(of_x, tile + bases_size, t.columns, x, l.m, token, tokens);
    }
    end_copies();
  };

  float c[2][8][4] = {};
  const int64_t first_token = int64_t(part) * kTile;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) begin(stage, first_token + stage * step);
  int stage = 0, free = kStages - 1;
  for (int64_t token = first_token; token < tokens; token += step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // of all threads; and they have done with the tile before, where the next copies go
    begin(free, token + (kStages - 1) * step);
    const T* const tile = stages + stage * stage_size;
    free = stage, stage = stage + 1 == kStages ? 0 : stage + 1;
    if (item >= t.items) continue;
    const Matrix<const T> a_matrix(tile + g * kTile * t.bases, t.bases / kUnit);
    const Matrix<const T> b_matrix(tile + bases_size + g * kTile * t.columns, t.columns / kUnit);
#pragma unroll
    for (int row = 0; row < kTile; row += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (i0 + half * 16 < t.bases)
          load_matrices<true>(a[half],
                              a_matrix.at(row + lane / 16 * 8 + lane % 8, i0 / kUnit + half * 2 + lane / 8 % 2));
#pragma unroll
      for (int pair = 0; pair < kColumns / 16; ++pair) {
        if (c0 + pair * 16 >= t.columns) continue;
        uint32_t b[4];
        load_matrices<true>(b, b_matrix.at(row + lane % 16, c0 / kUnit + pair * 2 + lane / 16));
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (i0 + half * 16 < t.bases) {
            multiply_add<T>(c[half][pair * 2], a[half], b[0], b[1]);
            multiply_add<T>(c[half][pair * 2 + 1], a[half], b[2], b[3]);
          }
      }
    }
  }
  if (item >= t.items) return;
  float* const to = partial + ((int64_t(part) << l.log_R) + first_group + g) * l.n_padded * l.K;
#pragma unroll
  for (int row = 0; row < 4; ++row)
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int i = i0 + row * 8 + lane / 4, column = c0 + n * 8 + lane % 4 * 2;
      if (i >= l.n_padded || column >= l.K) continue;
      float sums[2] = {c[row / 2][n][row % 2 * 2], c[row / 2][n][row % 2 * 2 + 1]}, before[2] = {};
      float* const at = to + int64_t(i) * l.K + column;
      if (add) load_pack(before, at, 2, true);
      sums[0] += before[0], sums[1] += before[1];
      store_pack(at, sums, 2, true);
    }
}

}  // namespace

int64_t gamma_parts(const HadamardLayout& l, int64_t tokens) { return gamma_tiles(l, tokens).parts; }

template <class T>
void product_gamma(const HadamardLayout& l, float* partial, int64_t parts, bool add, const T* x, const T* du,
                   int64_t tokens) {
  GammaTiles t = gamma_tiles(l, tokens);
  t.parts = int(parts);
  const int64_t shared = int64_t(kStages) * t.groups * kTile * (t.bases + t.columns) * int64_t(sizeof(T));
  launch(gamma_kernel<T>, {int64_t(t.group_blocks) * t.item_blocks * t.parts}, {kThreads, shared}, l, t, partial, add,
         x, du, tokens);
}

#define RANDLORA_INSTANTIATE(T) \
  template void product_gamma(const HadamardLayout&, float*, int64_t, bool, const T*, const T*, int64_t);
RANDLORA_INSTANTIATE(c10::BFloat16)
RANDLORA_INSTANTIATE(c10::Half)

}  // namespace randlora::cuda
