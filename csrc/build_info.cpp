#include "build_info.h"

#include <torch/version.h>

#include "cpu/isa.h"

#ifndef RANDLORA_VERSION
#define RANDLORA_VERSION "unknown"
#endif
#ifndef RANDLORA_CUDA_ARCHS
#define RANDLORA_CUDA_ARCHS ""
#endif
#ifndef RANDLORA_CUDA_VERSION
#define RANDLORA_CUDA_VERSION ""
#endif

namespace randlora {

std::map<std::string, std::string> build_info() {
  return {
      {"version", RANDLORA_VERSION},       {"torch", TORCH_VERSION},  {"cuda", RANDLORA_CUDA_VERSION},
      {"cuda_archs", RANDLORA_CUDA_ARCHS}, {"compiler", __VERSION__}, {"cpu_capability", cpu::isa_name()},
  };
}

}  // namespace randlora
