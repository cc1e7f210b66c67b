// The emulation itself: does it compute what a GPU would, and does it notice what a GPU would not forgive?
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../check.h"
#include "cuda/launch.cuh"
#include "cuda/tensor_cores.cuh"

namespace {

using randlora::cuda::launch;

// The sum of each warp's values, through shared memory to every thread of the block.
__global__ void sum_of_block(int* out) {
  __shared__ int sums[3];
  int sum = int(threadIdx.x + blockDim.x * threadIdx.y);
  const int t = sum;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (t % 32 == 0) sums[t / 32] = sum;
  __syncthreads();
  out[(blockIdx.x + gridDim.x * blockIdx.y) * 96 + t] = sums[0] + sums[1] + sums[2];
}

__global__ void neighbours(int* out) {
  const int value = int(threadIdx.x) * 10;
  out[threadIdx.x] = __shfl_down_sync(~0u, value, 3) + 1000 * __shfl_sync(~0u, value, 7);
}

__global__ void misses_barrier() {
  if (threadIdx.x < 40) return;
  __syncthreads();
}

__global__ void divergent_warp(int* out) {
  if (threadIdx.x % 2 == 0)
    out[threadIdx.x] = __shfl_sync(~0u, 1, 0);
  else
    out[threadIdx.x] = __shfl_sync(~0u, 2, 0);
}

// Without a barrier, what a thread sees of its neighbour depends on who runs first.
__global__ void races(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = int(threadIdx.x + blockIdx.x);
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

// c [16, 8] = a [16, 16] b, as the tensor cores take them; b is [16, 8] or, if `turned`, [8, 16].
__global__ void multiplies(float* c, const c10::BFloat16* a, const c10::BFloat16* b, bool turned) {
  using namespace randlora::cuda;
  alignas(16) __shared__ c10::BFloat16 rows[16][16], columns[16 * 8];
  const int lane = int(threadIdx.x);
  copy_later(&rows[lane / 2][lane % 2 * 8], a + lane * 8, true);
  if (lane < 16) copy_later(columns + lane * 8, b + lane * 8, true);
  end_copies();
  wait_for_copies<0>();
  __syncthreads();
  uint32_t from_a[4], from_b[4];
  load_matrices<false>(from_a, &rows[lane % 16][lane / 16 * 8]);
  if (turned)
    load_matrices<false>(from_b, columns + (lane % 8 * 2 + lane / 8 % 2) * 8);
  else
    load_matrices<true>(from_b, columns + lane % 16 * 8);
  float sums[4] = {};
  multiply_add<c10::BFloat16>(sums, from_a, from_b[0], from_b[1]);
  for (int x = 0; x < 4; ++x) c[(lane / 4 + x / 2 * 8) * 8 + lane % 4 * 2 + x % 2] = sums[x];
}

// What is in shared memory before and after waiting for a copy: two groups of them, of which one is waited for.
__global__ void looks_early(float* out, const float* from) {
  using namespace randlora::cuda;
  alignas(16) __shared__ float shared[3][4];
  for (int group = 0; group < 2; ++group) copy_later(shared[group], from, true), end_copies();
  copy_later(shared[2], from, false);
  out[0] = shared[0][1];
  wait_for_copies<1>();
  out[1] = shared[0][1], out[2] = shared[1][1];
  end_copies();
  wait_for_copies<0>();
  out[3] = shared[1][1], out[4] = shared[2][1];
}

template <class Function>
std::string message_of(const Function& function) {
  try {
    function();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

void blocks_and_shuffles() {
  std::vector<int> out(6 * 96, -1);
  launch(sum_of_block, {3, 2}, dim3(48, 2), out.data());
  for (const int value : out) CHECK_THAT(value == 95 * 96 / 2, value);
  out.assign(32, -1);
  launch(neighbours, {1}, 32, out.data());
  for (int t = 0; t < 32; ++t) CHECK_THAT(out[size_t(t)] == 70000 + 10 * (t < 29 ? t + 3 : t), t, " ", out[size_t(t)]);
}

void tensor_cores() {
  std::vector<c10::BFloat16> a(256), b(128);
  for (size_t x = 0; x < 256; ++x) a[x] = float(int(x * 7 % 19) - 9);
  for (size_t x = 0; x < 128; ++x) b[x] = float(int(x * 5 % 17) - 8);
  for (const bool turned : {false, true}) {
    std::vector<float> c(128, -1);
    alignas(16) c10::BFloat16 from_a[256], from_b[128];
    std::copy(a.begin(), a.end(), from_a), std::copy(b.begin(), b.end(), from_b);
    launch(multiplies, {1}, 32, c.data(), from_a, from_b, turned);
    for (size_t row = 0; row < 16; ++row)
      for (size_t column = 0; column < 8; ++column) {
        float sum = 0;
        for (size_t k = 0; k < 16; ++k)
          sum += float(a[row * 16 + k]) * float(turned ? b[column * 16 + k] : b[k * 8 + column]);
        CHECK_THAT(c[row * 8 + column] == sum, turned, " ", row, " ", column, ": ", c[row * 8 + column], " not ", sum);
      }
  }
}

void copies_come_late() {
  alignas(16) const float from[] = {1, 2, 3, 4};
  std::vector<float> out(5);
  launch(looks_early, {1}, 1, out.data(), static_cast<const float*>(from));
  CHECK_THAT(out[0] != 2 && out[1] == 2 && out[2] != 2 && out[3] == 2 && out[4] == 0, out[0], " ", out[1], " ", out[2],
             " ", out[3], " ", out[4]);
}

void missed_rendezvous() {
  const std::string missed = message_of([] {
    launch(misses_barrier, {1}, 64);
  });
  CHECK_THAT(missed.find("from thread 0 on returned; from thread 40 on at the block's rendezvous") != missed.npos,
             missed);
  std::vector<int> out(32);
  const std::string divergent = message_of([&] {
    launch(divergent_warp, {1}, 32, out.data());
  });
  CHECK_THAT(divergent.find("hangs") != divergent.npos, divergent);
  blocks_and_shuffles();  // a failed launch leaves nothing behind
}

void limits_of_launches() {
  for (const int64_t y : {0, 65536}) {
    const std::string message = message_of([&] {
      launch(misses_barrier, {1, y}, 32);
    });
    CHECK_THAT(!message.empty(), y);
  }
  CHECK_THAT(!message_of([] {
                launch(misses_barrier, {int64_t(1) << 31}, 32);
              }).empty(),
             "2^31 blocks");
  CHECK_THAT(!message_of([] {
                launch(misses_barrier, {1}, 1025);
              }).empty(),
             "1025 threads");
}

void races_show() {
  std::vector<int> one(64), other(64);
  launch(races, {1}, 64, one.data());
  emulation::backwards = true;
  launch(races, {1}, 64, other.data());
  emulation::backwards = false;
  CHECK_THAT(one != other, "both orders agree on a race");
}

}  // namespace

void test_emulation() {
  check::run("emulation: blocks and shuffles", blocks_and_shuffles);
  check::run("emulation: tensor cores", tensor_cores);
  check::run("emulation: copies come late", copies_come_late);
  check::run("emulation: missed rendezvous", missed_rendezvous);
  check::run("emulation: limits of launches", limits_of_launches);
  check::run("emulation: races", races_show);
}
