// The emulation itself: does it compute what a GPU would, and does it notice what a GPU would not forgive?
#include <stdexcept>
#include <string>
#include <vector>

#include "../check.h"
#include "cuda/launch.cuh"

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
  check::run("emulation: missed rendezvous", missed_rendezvous);
  check::run("emulation: limits of launches", limits_of_launches);
  check::run("emulation: races", races_show);
}
