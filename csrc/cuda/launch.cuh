// What every CUDA op needs around its kernels.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>
#include <cuda_runtime.h>

#include "dtypes.h"
#include "sizes.h"

namespace randlora::cuda {

// N consecutive elements, moved as one access of up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N <= 16 ? sizeof(T) * N : 16) Pack {
  T v[N];
};

// *to = pack, by an intrinsic: the compiler would split an assignment into single elements, to share their stores with
// the other branch. (Global stores are cached in L2 anyway.)
template <class T, int N>
__device__ __forceinline__ void store_whole(T* to, const Pack<T, N>& pack) {
  using Word =
      std::conditional_t<alignof(Pack<T, N>) == 16, uint4,
                         std::conditional_t<alignof(Pack<T, N>) == 8, uint2,
                                            std::conditional_t<alignof(Pack<T, N>) == 4, unsigned, unsigned short>>>;
  static_assert(alignof(Word) == alignof(Pack<T, N>) && sizeof(Word) == alignof(Word));
#pragma unroll
  for (int i = 0; i < int(sizeof(pack) / sizeof(Word)); ++i)
    __stcg(reinterpret_cast<Word*>(to) + i, reinterpret_cast<const Word*>(&pack)[i]);
}

// Elements a thread moves at once: 16 bytes of storage.
template <class T>
inline constexpr int kVec = 16 / int(sizeof(T));

// p[0:valid] as accumulators, zeros behind; one access where `vector` says that the row is aligned for it.
template <int N, class Acc, class T>
__device__ __forceinline__ void load_pack(Acc (&to)[N], const T* p, int64_t valid, bool vector) {
  if (vector && valid >= N) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
    for (int e = 0; e < N; ++e) to[e] = static_cast<Acc>(pack.v[e]);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) to[e] = e < valid ? static_cast<Acc>(p[e]) : Acc(0);
  }
}

template <int N, class Acc, class T>
__device__ __forceinline__ void store_pack(T* p, const Acc (&from)[N], int64_t valid, bool vector) {
  if (vector && valid >= N) {
    Pack<T, N> pack;
#pragma unroll
    for (int e = 0; e < N; ++e) pack.v[e] = static_cast<T>(from[e]);
    store_whole(p, pack);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (e < valid) p[e] = static_cast<T>(from[e]);
  }
}

// Whether rows of N elements of T that start at `p` plus multiples of the strides can be moved as packs.
template <class T, int N>
bool can_pack(const void* p, std::initializer_list<int64_t> strides) {
  bool aligned = reinterpret_cast<uintptr_t>(p) % alignof(Pack<T, N>) == 0;
  for (const int64_t stride : strides) aligned = aligned && stride * int64_t(sizeof(T)) % alignof(Pack<T, N>) == 0;
  return aligned;
}

// The shared memory that the launch gave the block. One name for all types, as the compiler wants it.
template <class T>
__device__ __forceinline__ T* launched_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char randlora_launched_shared[];
  return reinterpret_cast<T*>(randlora_launched_shared);
#else
  return static_cast<T*>(emulation::launched_shared());
#endif
}

// Blocks along each axis; at least one.
struct Grid {
  int64_t x, y = 1;
};

// Threads of a block, and bytes of shared memory beyond what its kernel declares.
struct Block {
  dim3 threads;
  int64_t shared = 0;

  Block(dim3 threads) : threads(threads) {}
  Block(int threads, int64_t shared = 0) : threads(unsigned(threads)), shared(shared) {}
};

// kernel<<<grid, block>>>(arguments...) on the current stream. As a function and not by <<<>>>, so that a C++ compiler
// reads it too: tests/cpp/emulation runs the kernels on the CPU.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, Block block, Arguments&&... arguments) {
  TORCH_CHECK(grid.x <= 2147483647 && grid.y <= 65535, "randlora: too large for one launch: ", grid.x, " x ", grid.y,
              " blocks");
  constexpr int64_t kSharedForAll = 48 << 10;  // more is given only to kernels that ask for it
  if (block.shared > kSharedForAll) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, int(block.shared));
    TORCH_CHECK(error == cudaSuccess, "randlora: this GPU cannot give a block the ", block.shared >> 10,
                " KiB of shared memory that a layer of this size needs");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid.x), unsigned(grid.y));
  config.blockDim = block.threads;
  config.dynamicSmemBytes = size_t(block.shared);
  config.stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

}  // namespace randlora::cuda
