// Hadamard bases on CUDA: what its kernels share. The algebra is that of hadamard.h, with one thing more: p < P <= L,
// L = 2^ceil(log2 P), so the higher bits of o meet none of p and W(o, p) = W(o mod L, p). Tokens are transformed at
// length L, however wide the wide side is: up() gives every o the element o mod L, down() adds up the o of an element
// first. So a block's transform fits shared memory, and a layer of 4096 and 14336 features has L = 4096 and not 16384.
//
// Tokens come in chunks of kChunkBytes of intermediates, which stay in the L2 cache:
//
//   up         group      x [t, m] to [t, R, K], the columns of a group side by side
//              at::bmm    u [t, R, n] = x gamma^T, R products at once through strided views
//              spread     transforms over g and p in registers and shared memory, wide += b h
//   down       collect    transforms wide over o and k to du [t, R, n]
//              at::bmm    [t, R, K] = du gamma, and narrow += it, back in the order of columns (ungroup)
//   gradients  group, u, then collect, which puts du in the place of u and adds up v z over tokens; dgamma = du^T x
//
// The sides of a product are padded with zeros to multiples of 16 bytes. Intermediates have the tokens' type, sums that
// of acc_t. A few tokens, as in decoding, take kernels of their own for the products, which read gamma once and as it
// is.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch.cuh"
#include "hadamard.h"

namespace randlora::cuda {

constexpr int64_t kChunkBytes = int64_t{32} << 20;
constexpr int64_t kFewTokens = 8;
constexpr int kTokenThreads = 512;  // at most, of spread and collect
constexpr int kBatch = 8;           // groups of a thread that are loaded before the first of them is used

// Groups whose transform a thread holds in registers; where R is larger, transform_groups does the rest.
template <class Acc>
inline constexpr int kLogGroups = sizeof(Acc) == 8 ? 4 : 5;

// A layer, for tokens of one type.
struct HadamardLayout {
  const int32_t *a, *b, *c;  // sign bits
  int64_t M;
  int m, n, r, P;
  int log_w, log_R;
  int K, n_padded;  // columns of a group and bases, zeros included
  int log_length;   // of the transform, at least 16
  int log_slots;    // tokens that a block transforms at a time
  int threads;      // of such a block
  int64_t shared;   // its bytes
  int64_t chunk;    // tokens
  int log_high;     // R / 2^log_high groups in registers
};

template <class T>
HadamardLayout hadamard_layout(const HadamardShape& s) {
  using Acc = acc_t<T>;
  constexpr int kAligned = 16 / int(sizeof(T)), kLogElements = 12;  // at least, of a block
  const auto log2_of = [](int64_t at_least) {
    int log = 0;
    while ((int64_t{1} << log) < at_least) ++log;
    return log;
  };
  HadamardLayout l{};
  l.log_length = std::max(4, log2_of(s.P));
  constexpr int kLongest = sizeof(Acc) == 8 ? 14 : 15;
  TORCH_CHECK_VALUE(l.log_length <= kLongest, "on a GPU Hadamard bases take layers with n r <= ", 1 << kLongest, " in ",
                    sizeof(Acc) == 8 ? "float64" : "float32 and 16 bits", ", got n r = ", s.P);
  l.a = s.a, l.b = s.b, l.c = s.c;
  l.M = s.M;
  l.m = int(s.m), l.n = int(s.n), l.r = int(s.r), l.P = int(s.P);
  l.log_w = log2_of(s.width), l.log_R = log2_of(s.R);
  const int64_t columns = std::max<int64_t>(s.width, kAligned);
  l.K = int(divide_up(s.columns, columns) * columns);
  l.n_padded = int(divide_up(s.n, kAligned) * kAligned);
  l.log_slots = std::max(0, kLogElements - l.log_length);
  l.log_high = std::max(0, l.log_R - kLogGroups<Acc>);
  const int64_t elements = int64_t{1} << (l.log_length + l.log_slots);
  l.threads = int(std::min<int64_t>(kTokenThreads, elements >> kLogGroups<Acc>));
  l.shared = elements * int64_t(sizeof(Acc));
  l.chunk = std::max<int64_t>(1, kChunkBytes / (s.R * (l.K + l.n_padded) * int64_t(sizeof(T))));
  return l;
}

__device__ __forceinline__ bool minus(const int32_t* words, int64_t x) {
  return uint32_t(words[x / 32]) >> (x % 32) & 1u;
}

template <class Acc>
__device__ __forceinline__ Acc with_sign(Acc value, bool minus) {
  return minus ? -value : value;
}

// function(constant) with the number of bits of g that a thread transforms.
template <class Acc, class Function>
__host__ __device__ __forceinline__ void with_log_groups(const HadamardLayout& l, const Function& function) {
  switch (l.log_R - l.log_high) {
    case 0: return function(std::integral_constant<int, 0>{});
    case 1: return function(std::integral_constant<int, 1>{});
    case 2: return function(std::integral_constant<int, 2>{});
    case 3: return function(std::integral_constant<int, 3>{});
    case 4: return function(std::integral_constant<int, 4>{});
    default:
      if constexpr (kLogGroups<Acc> == 5) function(std::integral_constant<int, 5>{});
  }
}

// Asks for `bytes` of memory from `begin` on, so that they are in the L2 cache when the block loads them.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__CUDACC__)
  constexpr int kLine = 128;
  for (int64_t at = int64_t(threadIdx.x) * kLine; at < bytes; at += int64_t(blockDim.x) * kLine)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(begin) + at));
#endif
}

// Rows of `wide` [tokens, M] that a block transforms at a time, from first_token on.
template <class T>
__device__ __forceinline__ void prefetch_rows(const HadamardLayout& l, const T* wide, int64_t first_token,
                                              int64_t tokens) {
  const int64_t count = min(int64_t{1} << l.log_slots, tokens - first_token);
  prefetch(wide + first_token * l.M, count * l.M * int64_t(sizeof(T)));
}

// Bases i of u [tokens, R, n_padded], with the groups of one thread: 2^log_groups from `group` on.
struct Column {
  int slot, group, i;
  int64_t token;
};

__device__ __forceinline__ Column column_of(const HadamardLayout& l, int index, int bases, int64_t first_token) {
  Column c;
  c.i = index % bases;
  const int rest = index / bases;
  c.slot = rest >> l.log_high;
  c.group = (rest & ((1 << l.log_high) - 1)) << (l.log_R - l.log_high);
  c.token = first_token + c.slot;
  return c;
}

template <class T>
__device__ __forceinline__ T* of_column(const HadamardLayout& l, T* u, const Column& c) {
  return u + ((c.token << l.log_R) + c.group) * l.n_padded + c.i;
}

template <int kLog, class T>
__device__ __forceinline__ void load_groups(acc_t<T> (&v)[1 << kLog], const HadamardLayout& l, const T* from) {
#pragma unroll
  for (int g = 0; g < 1 << kLog; ++g) v[g] = static_cast<acc_t<T>>(from[g * l.n_padded]);
}

// ---- kernels, as functions of the host ----

// What a call makes of the parameters.
template <class T>
struct HadamardParameters {
  const acc_t<T>* lambda;  // [r, n]
  const acc_t<T>* gamma;   // [n, m]
  acc_t<T> scale;
  acc_t<T>* table;  // [R n]: scale c lambda, zeros behind it, so that no load has to ask whether there is a row
  T* grouped;       // [R, n_padded, K]: a gamma; null where it is not needed
};

// In one launch: what is made of the parameters, if `parameters`, and x [tokens, m] to grouped [tokens, R, K].
template <class T>
void group(const HadamardLayout& l, const HadamardParameters<T>& p, bool parameters, const T* x, T* grouped,
           int64_t tokens);

// out [tokens, m] += grouped [tokens, R, K]
template <class T>
void ungroup(const HadamardLayout& l, T* out, const T* grouped, int64_t tokens);

// dgamma [n, m] (+)= a grouped [R, n_padded, K], or nothing where that is null. dlambda [P] = scale c * the sum of
// partial's rows, or nothing where that is null.
template <class Acc>
void finish_gradients(const HadamardLayout& l, Acc* dgamma, const Acc* grouped, bool add, Acc* dlambda,
                      const Acc* partial, int64_t rows, Acc scale);

// For at most kFewTokens tokens and R <= kFewGroups. u [tokens, R, n_padded] of x and gamma, and the table.
template <class T>
void few_products_up(const HadamardLayout& l, const HadamardParameters<T>& p, T* u, const T* x, int64_t tokens);
template <class T>
void few_products_down(const HadamardLayout& l, const HadamardParameters<T>& p, T* out, const T* du, int64_t tokens);
constexpr int kFewGroups = 256;

// u [tokens, R, n_padded] transformed over the bits of g beyond kLogGroups, which spread and collect leave out: of u
// before them, of du behind collect. Nothing where there are none.
template <class T>
void transform_groups(const HadamardLayout& l, T* u, int64_t tokens);

// wide [tokens, M] += what u [tokens, R, n_padded] becomes.
template <class T>
void spread(const HadamardLayout& l, T* wide, const T* u, const acc_t<T>* table, int64_t tokens);

// The most blocks that collect has, as many as an H100 runs at a time; no fewer tokens to the one than to the other but
// by one. Each has a row per slot in `partial` [rows, P].
constexpr int64_t kCollectBlocks = 6 * 132;
inline int64_t collect_rows(const HadamardLayout& l, int64_t tokens) {
  const int64_t items = divide_up(tokens, int64_t{1} << l.log_slots);
  return divide_up(items, divide_up(items, kCollectBlocks)) << l.log_slots;
}

// u [tokens, R, n_padded] to du of wide [tokens, M]. With `partial` (of `rows` rows) u holds u before, and the rows get
// the sums of v z added, or set if `first`.
template <class T>
void collect(const HadamardLayout& l, const T* wide, T* u, const acc_t<T>* table, acc_t<T>* partial, int64_t rows,
             bool first, int64_t tokens);

// u [count, R, n_padded] of the unit vectors j, first <= j < first + count, and dgamma[:, j] of their du.
template <class Acc>
void unit_products_up(const HadamardLayout& l, Acc* u, const Acc* gamma, int64_t first, int64_t count);
template <class Acc>
void unit_gradients(const HadamardLayout& l, Acc* dgamma, const Acc* du, int64_t first, int64_t count);

// macro(T) for the types of tokens.
#define RANDLORA_HADAMARD_TYPES(macro) macro(double) macro(float) macro(c10::BFloat16) macro(c10::Half)

}  // namespace randlora::cuda
