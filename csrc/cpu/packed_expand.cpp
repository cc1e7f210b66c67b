// Packed ternary bases made dense on the CPU, for products that take them so: sixteen elements from each word.
#include <algorithm>

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/large.h"
#include "cpu/unpack.h"
#include "dtypes.h"
#include "packed_update.h"
#include "sizes.h"

namespace randlora::cpu {
namespace {

// Rows [begin, end) of out [rows, length] from bits [rows, planes, words].
template <class T>
struct ExpandRows {
  using Acc = acc_t<T>;

  static RANDLORA_INLINE void run(T* out, int64_t length, const int16_t* bits, int64_t planes, int64_t words,
                                  int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* const to = out + row * length;
      const auto* const plus = reinterpret_cast<const uint16_t*>(bits) + row * planes * words;
      const uint16_t* const minus = plus + (planes - 1) * words;
      const int64_t whole = length / 16;
      for (int64_t w = 0; w < whole; ++w) word(to + 16 * w, plus[w], minus[w], planes);
      if (length % 16 != 0) {
        T values[16];
        word(values, plus[whole], minus[whole], planes);
        std::copy_n(values, length % 16, to + 16 * whole);
      }
    }
  }

  static RANDLORA_INLINE void word(T* to, uint32_t plus, uint32_t minus, int64_t planes) {
    Acc values[16];
    unpack16(values, planes == 1 ? ~minus : plus, minus);
    for (int l = 0; l < 16; l += kLanes<Acc>) store(to + l, load(values + l));
  }
};

template <class T>
void expand_bits(const at::Tensor& out, int64_t length, const int16_t* bits, int64_t planes, int64_t words) {
  T* const data = advise_large(out).mutable_data_ptr<T>();
  at::parallel_for(0, out.size(0), std::max<int64_t>(1, 32768 / length), [&](int64_t begin, int64_t end) {
    cpu::run<ExpandRows<T>>(data, length, bits, planes, words, begin, end);
  });
}

template <class T>
void expand(const Expansion& e) {
  const PackedPattern& s = e.s;
  if (s.a_planes != nullptr) {
    expand_bits<T>(e.A, s.m, s.a_planes + e.first * s.planes * s.a_words, s.planes, s.a_words);
  } else {
    T* const a = e.A.zero_().template mutable_data_ptr<T>();
    for (int64_t k = e.first; k < e.first + e.rows; ++k)
      for (int32_t i = s.a_starts[k]; i < s.a_starts[k + 1] && s.a_entries[i] >> 1 < s.m; ++i)
        a[(k - e.first) * s.m + (s.a_entries[i] >> 1)] = T(s.a_entries[i] & 1 ? -1.0f : 1.0f);
  }
  expand_bits<T>(e.B2t, s.M, s.b_planes + e.first * s.n * s.planes * s.words, s.planes, s.words);
}

std::tuple<at::Tensor, at::Tensor> packed_expand(at::TensorList pattern, int64_t n, int64_t m, int64_t M,
                                                 at::ScalarType dtype, int64_t first, std::optional<int64_t> rows) {
  const Expansion e = make_expansion(pattern, n, m, M, dtype, first, rows);
  with_float_type(dtype, [&](auto type) {
    expand<decltype(type)>(e);
  });
  return {e.A, e.B2t};
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, CPU, m) { m.impl("packed_expand", &packed_expand); }

}  // namespace randlora::cpu
