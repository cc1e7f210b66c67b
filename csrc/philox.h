// Philox4x32-10 (Salmon et al., SC'11; Random123) and what the random bases make of its words.
// Shared by CPU and CUDA, so that both give the same bits. The definition is fixed: saved adapters depend on it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RANDLORA_HD __host__ __device__ __forceinline__
#else
#define RANDLORA_HD inline __attribute__((always_inline))
#endif

namespace randlora {

struct Philox4 {
  uint32_t v[4];
};

RANDLORA_HD Philox4 philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ key0;
    const uint32_t n2 = uint32_t(p0 >> 32) ^ c3 ^ key1;
    c0 = n0;
    c1 = uint32_t(p1);
    c2 = n2;
    c3 = uint32_t(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Which tensor a word belongs to: word 3 of the counter.
enum class Stream : uint32_t { A = 0, B = 1, dropout = 2, hadamard_a = 3, hadamard_b = 4, hadamard_c = 5 };

// Element [x0, x1, x2] of a base is lane x2 % 4 of the counter {x2 / 4, x1, x0, stream}: for A[k, 0, j] that is
// {j / 4, 0, k, 0}, for B[o, i, k] {k / 4, i, o, 1}. It depends on its indices and the seed, never on the tensor's
// size.
RANDLORA_HD Philox4 base_words(uint32_t quad, uint32_t x1, uint32_t x0, Stream stream, uint32_t key0, uint32_t key1) {
  return philox4x32_10(quad, x1, x0, uint32_t(stream), key0, key1);
}

// Uniform on 2^24 points symmetric around zero, unit variance, one rounding (2q + 1 is exact in float).
struct DenseElement {
  RANDLORA_HD float operator()(uint32_t u) const {
    const int32_t q = int32_t(u >> 8) - (1 << 23);
    return float(2 * q + 1) * 0x1.bb67aep-24f;  // float32(sqrt(3) * 2^-24)
  }
};

// -1, 0, +1 with P(-1) = P(+1) = threshold / 2^32; the unit-variance factor sqrt(z) stays outside.
struct TernaryElement {
  uint32_t threshold;  // floor(2^32 / (2 z)), at most 2^31

  RANDLORA_HD int32_t operator()(uint32_t u) const { return int32_t(u >= 0u - threshold) - int32_t(u < threshold); }
};

// -1 or +1: the signs of Hadamard bases.
struct SignElement {
  RANDLORA_HD int32_t operator()(uint32_t u) const { return 1 - 2 * int32_t(u >> 31); }
};

}  // namespace randlora
