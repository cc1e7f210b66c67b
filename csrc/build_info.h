// What this binary was built from and what it found on this machine.
#pragma once

#include <map>
#include <string>

namespace randlora {

// Keys: version, torch, cuda ("" without), cuda_archs ("" without), compiler, cpu_capability.
std::map<std::string, std::string> build_info();

}  // namespace randlora
