// One kernel body, compiled for several instruction sets, picked at run time: the binary stays portable x86-64 (or any
// other CPU) and still uses AVX2 or AVX-512 where the machine has it.
//
// A kernel is a struct with `static RANDLORA_INLINE void run(args...)`; everything it calls must be RANDLORA_INLINE
// too, because only what is inlined into run_avx512() / run_avx2() is compiled for that instruction set.
#pragma once

#if !defined(_OPENMP)
#error "compile with -fopenmp: at::parallel_for is a serial loop without it"
#endif

#define RANDLORA_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define RANDLORA_X86 1
#if defined(__clang__)
#define RANDLORA_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#else
#define RANDLORA_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#endif
#define RANDLORA_TARGET_AVX2 __attribute__((target("avx2,fma")))
#endif

namespace randlora::cpu {

enum class Isa { portable, avx2, avx512 };

// The best instruction set of this machine; the environment variable RANDLORA_CPU_CAPABILITY (portable, avx2, avx512)
// lowers it, for tests and for comparing.
Isa isa();
const char* isa_name();

#if RANDLORA_X86
template <class Kernel, class... Args>
RANDLORA_TARGET_AVX512 void run_avx512(const Args&... args) {
  Kernel::run(args...);
}

template <class Kernel, class... Args>
RANDLORA_TARGET_AVX2 void run_avx2(const Args&... args) {
  Kernel::run(args...);
}
#endif

template <class Kernel, class... Args>
void run_portable(const Args&... args) {
  Kernel::run(args...);
}

template <class Kernel, class... Args>
void run(const Args&... args) {
  switch (isa()) {
#if RANDLORA_X86
    case Isa::avx512: return run_avx512<Kernel>(args...);
    case Isa::avx2: return run_avx2<Kernel>(args...);
#endif
    default: return run_portable<Kernel>(args...);
  }
}

// For kernels whose blocking depends on how many registers there are, and how wide: one for each instruction set.
template <class Avx512, class Avx2, class Portable, class... Args>
void run_fitted(const Args&... args) {
  switch (isa()) {
#if RANDLORA_X86
    case Isa::avx512: return run_avx512<Avx512>(args...);
    case Isa::avx2: return run_avx2<Avx2>(args...);
#endif
    default: return run_portable<Portable>(args...);
  }
}

}  // namespace randlora::cpu
