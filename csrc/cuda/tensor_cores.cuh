// Products of 16-bit matrices on tensor cores, and copies to shared memory that nobody waits for. What a lane of a warp
// holds of a matrix is what mma.m16n8k16 wants; with l its number:
//
//   a [16, 16]   rows l / 4 (a[0], a[2]) and 8 more (a[1], a[3]), columns 2 (l % 4) + {0, 1}, and 8 more (a[2], a[3])
//   b [16, 8]    rows 2 (l % 4) + {0, 1}, and 8 more (b1), column l / 4
//   c [16, 8]    rows l / 4 (c[0], c[1]) and 8 more (c[2], c[3]), columns 2 (l % 4) + {0, 1}
#pragma once

#include <cstdint>
#include <type_traits>

#include <c10/util/BFloat16.h>
#include <cuda_runtime.h>

namespace randlora::cuda {

#if defined(__CUDACC__)
__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
#endif

// Four 8 x 8 matrices from shared memory: lane l says where row l % 8 of matrix l / 8 lies, 16 aligned bytes, and gets
// of each matrix elements 2 (l % 4) + {0, 1} of row l / 4; or of its column l / 4, if kTransposed.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
#if !defined(__CUDACC__)
  emulation::load_matrices(to, row, kTransposed);
#else
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// c += a b, for T of 16 bits.
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(sizeof(T) == 2);
#if !defined(__CUDACC__)
  emulation::multiply_add<T>(c, a, b0, b1);
#else
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Begins to copy 16 aligned bytes to shared memory, or zeros unless `valid`; `from` is the address of something anyway.
__device__ __forceinline__ void copy_later(void* to, const void* from, bool valid) {
#if !defined(__CUDACC__)
  emulation::copy_later(to, from, valid);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
#endif
}

// Ends a group of such copies.
__device__ __forceinline__ void end_copies() {
#if !defined(__CUDACC__)
  emulation::end_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until no more than the last kLeft groups of this thread's copies are under way.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
#if !defined(__CUDACC__)
  emulation::wait_for_copies(kLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

}  // namespace randlora::cuda
