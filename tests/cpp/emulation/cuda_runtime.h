// A stand-in for the CUDA runtime and the device's built-ins: a C++ compiler makes host code of csrc/cuda/*.cu, which
// runs block after block on the CPU with the semantics of a block. Its threads are fibers that give way at rendezvous
// only: __syncthreads for the block, shuffles and __syncwarp for a warp. Thrown, from the launch: a thread that misses
// a rendezvous, or meets another one than the others. Shared memory keeps what the block before left in it.
//
// What it cannot show: anything that depends on the order of memory accesses between two rendezvous, beyond the two
// orders in which `backwards` runs threads and blocks; the limits of registers and shared memory; speed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __host__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the fiber that is running.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

using std::max;
using std::min;

namespace emulation {

// The order of threads in a block and of blocks in a grid: results must not depend on it.
inline bool backwards = false;

// `shared` bytes of dynamic shared memory, not numbers before the kernel writes some.
void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel);

// The dynamic shared memory of the block that is running.
void* launched_shared();

// Called by fibers; `line` tells one rendezvous from another.
void meet_block(int line);
uint64_t meet_warp(unsigned mask, uint64_t value, int from_lane, int line);

int lane();

template <class T>
T shuffle(unsigned mask, T value, int from_lane, int line) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_warp(mask, bits, from_lane, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

template <class T>
void __stcg(T* to, T value) {
  *to = value;
}

inline void __syncthreads(int line = __builtin_LINE()) { emulation::meet_block(line); }

inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { emulation::meet_warp(mask, 0, 0, line); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int line = __builtin_LINE()) {
  return emulation::shuffle(mask, value, from % 32, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int line = __builtin_LINE()) {
  return emulation::shuffle(mask, value, emulation::lane() ^ bits, line);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  const int from = emulation::lane() + int(delta);
  return emulation::shuffle(mask, value, from < 32 ? from : emulation::lane(), line);
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorInvalidValue };
using cudaStream_t = void*;

// Of an H100, beside what a kernel declares and the runtime reserves.
constexpr int kMaxSharedOfBlock = 227 << 10;

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return value <= kMaxSharedOfBlock ? cudaSuccess : cudaErrorInvalidValue;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
  const dim3 g = config->gridDim, b = config->blockDim;
  const bool fits = g.x >= 1 && g.x <= 0x7FFFFFFFu && g.y >= 1 && g.y <= 65535 && g.z >= 1 && g.z <= 65535;
  if (config->dynamicSmemBytes > size_t(kMaxSharedOfBlock)) return cudaErrorInvalidValue;
  if (!fits || b.x < 1 || b.y < 1 || b.z < 1 || uint64_t(b.x) * b.y * b.z > 1024) return cudaErrorInvalidConfiguration;
  // Parameters are copied at the launch, as the runtime does.
  [&](Parameters... copies) {
    emulation::run(g, b, config->dynamicSmemBytes, [&] {
      kernel(copies...);
    });
  }(std::forward<Arguments>(given)...);
  return cudaSuccess;
}
