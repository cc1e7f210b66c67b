// Hadamard bases on CUDA: a block's transforms, through registers and shared memory.
#pragma once

#include "cuda/hadamard.cuh"

namespace randlora::cuda {

constexpr int kPass = 16;  // elements of a thread that are neighbours in memory

// v[o] = sum_p W(o, p) v[p], 2^kLog elements.
template <int kLog, class Acc>
__device__ __forceinline__ void transform(Acc (&v)[1 << kLog]) {
#pragma unroll
  for (int bit = 0; bit < kLog; ++bit)
#pragma unroll
    for (int x = 0; x < 1 << kLog; ++x)
      if ((x >> bit & 1) == 0) {
        const Acc one = v[x], other = v[x | 1 << bit];
        v[x] = one + other;
        v[x | 1 << bit] = one - other;
      }
}

// Where element x of a block's array lies in shared memory: so that the lanes of a warp, which differ in bits 0 to 4 of
// x, or 0 to 3 and 9, find 32 banks, and where they differ in bits 4 to 8 and move 16 bytes each, every eight of them.
// A permutation within 32 elements that keeps four neighbours, and place(x ^ y) = place(x) ^ place(y).
__host__ __device__ constexpr int place(int x) { return x ^ (x >> 3 & 28) ^ (x >> 5 & 16); }

// array[place(first | x << kBit)], at = place(first), first without bits in x's place. Only bits 2 to 4 of `at` change
// by more than an addition, so that most of an address is part of the instruction.
template <int kBit, class Acc>
__device__ __forceinline__ Acc& element(Acc* array, int at, int x) {
  const int placed = place(x << kBit);
  return array[(at ^ (placed & 31)) + (placed & ~31)];
}

// kPass elements from the index that has its place at `at` on, and back.
template <class Acc>
__device__ __forceinline__ void load_neighbours(Acc (&v)[kPass], const Acc* array, int at) {
  constexpr int N = kVec<Acc>;
#pragma unroll
  for (int x = 0; x < kPass; x += N) {
    const Pack<Acc, N> pack = *reinterpret_cast<const Pack<Acc, N>*>(array + (at ^ x));
#pragma unroll
    for (int e = 0; e < N; ++e) v[x + e] = pack.v[e];
  }
}
template <class Acc>
__device__ __forceinline__ void store_neighbours(Acc* array, int at, const Acc (&v)[kPass]) {
  constexpr int N = kVec<Acc>;
#pragma unroll
  for (int x = 0; x < kPass; x += N) {
    Pack<Acc, N> pack;
#pragma unroll
    for (int e = 0; e < N; ++e) pack.v[e] = v[x + e];
    *reinterpret_cast<Pack<Acc, N>*>(array + (at ^ x)) = pack;
  }
}

// One pass of a block over its transforms, for bits kBit ... of the index; elements from `valid` on count as zeros.
template <int kLog, int kBit, bool kPadded, class Acc>
__device__ __forceinline__ void transform_pass(Acc* array, int elements, int length, int valid) {
  for (int item = int(threadIdx.x); item < elements >> kLog; item += int(blockDim.x)) {
    // In bits 4 to 7 of the index the lanes would differ in bit 8, where they meet in a bank; so in bit 9.
    const int i = kBit == 4 && kLog == 4 ? (item & ~48) | (item & 16) << 1 | (item & 32) >> 1 : item;
    const int first = (i >> kBit << (kBit + kLog)) | (i & ((1 << kBit) - 1)), at = place(first);
    Acc v[1 << kLog];
#pragma unroll
    for (int x = 0; x < 1 << kLog; ++x)
      v[x] = !kPadded || (first & (length - 1)) + (x << kBit) < valid ? element<kBit>(array, at, x) : Acc(0);
    transform<kLog>(v);
#pragma unroll
    for (int x = 0; x < 1 << kLog; ++x) element<kBit>(array, at, x) = v[x];
  }
  __syncthreads();
}

// The passes for bits kBit to kBit + 3, as far as the transform has them.
template <int kBit, class Acc>
__device__ __forceinline__ void transform_bits(Acc* array, const HadamardLayout& l, int valid) {
  const int elements = 1 << (l.log_length + l.log_slots), length = 1 << l.log_length;
  switch (l.log_length - kBit) {
    case 1: return transform_pass<1, kBit, true>(array, elements, length, valid);
    case 2: return transform_pass<2, kBit, true>(array, elements, length, valid);
    case 3: return transform_pass<3, kBit, true>(array, elements, length, valid);
    default: break;
  }
  if constexpr (kBit < 12) {
    if (l.log_length < kBit + 4) return;
    if (l.log_length == kBit + 4 && valid < length)
      transform_pass<4, kBit, true>(array, elements, length, valid);
    else
      transform_pass<4, kBit, false>(array, elements, length, valid);
  }
}

}  // namespace randlora::cuda
