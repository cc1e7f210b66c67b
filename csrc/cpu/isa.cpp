#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include <c10/util/Exception.h>

namespace randlora::cpu {
namespace {

Isa best_of_machine() {
#if RANDLORA_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa choose() {
  const Isa best = best_of_machine();
  const char* wish = std::getenv("RANDLORA_CPU_CAPABILITY");
  if (wish == nullptr || *wish == '\0') return best;
  const std::string_view name(wish);
  TORCH_CHECK_VALUE(name == "portable" || name == "avx2" || name == "avx512",
                    "RANDLORA_CPU_CAPABILITY must be portable, avx2 or avx512, got \"", wish, "\"");
  const Isa asked = name == "portable" ? Isa::portable : name == "avx2" ? Isa::avx2 : Isa::avx512;
  return std::min(asked, best);
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

}  // namespace randlora::cpu
