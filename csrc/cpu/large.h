// Large results cost more in page faults than in arithmetic: writing 64 MB into fresh memory takes 16384 faults.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace randlora::cpu {

// Asks the kernel to back a freshly allocated, large tensor with 2 MB pages. Only whole pages inside the tensor are
// named, so it takes no more memory than before; where the system does not offer them, nothing changes.
inline const at::Tensor& advise_large(const at::Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) & ~(kPage - 1), last = (begin + t.nbytes()) & ~(kPage - 1);
  if (last >= first + 2 * kPage) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return t;
}

}  // namespace randlora::cpu
