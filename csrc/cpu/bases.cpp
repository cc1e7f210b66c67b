// Random bases on the CPU. 32 Philox counters at a time; every core takes its own rows x0.
#include "bases.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/large.h"
#include "cpu/vec.h"
#include "dtypes.h"

namespace randlora::cpu {
namespace {

constexpr int kQuads = 32;  // counters of a batch
constexpr int kBatch = 4 * kQuads;

template <class T, class Element>
RANDLORA_INLINE void store_batch(T* out, const uint32_t* words, const Element& element) {
  if constexpr (std::is_same_v<T, c10::BFloat16> || std::is_same_v<T, c10::Half>) {
    float values[kBatch];
    for (int e = 0; e < kBatch; ++e) values[e] = float(element(words[e]));
    for (int e = 0; e < kBatch; e += kLanes<float>) store(out + e, load(values + e));
  } else {
    for (int e = 0; e < kBatch; ++e) out[e] = T(element(words[e]));
  }
}

// The rows (x0, *) of the slice, x0 in [begin, end). Their counters form one sequence over (x1, quad), walked in
// batches that may span several short rows: a row of B is only r elements long.
template <class T, class Element>
struct FillRows {
  static RANDLORA_INLINE void run(T* out, const BaseSlice& s, const Element& element, int64_t begin, int64_t end) {
    const uint32_t quads = uint32_t(s.quads_per_row());
    const uint32_t first_quad = s.start2 / 4;
    const int64_t total = s.size1 * int64_t(quads);
    const bool whole_quads = s.start2 % 4 == 0 && s.size2 % 4 == 0;
    const bool rows_touch = whole_quads && s.stride1 == s.size2;

    for (int64_t x0 = begin; x0 < end; ++x0) {
      T* const row0 = out + x0 * s.stride0;
      const uint32_t c2 = s.start0 + uint32_t(x0);
      uint32_t quad[kQuads], x1[kQuads];
      for (uint32_t l = 0; l < kQuads; ++l) {
        quad[l] = l % quads;
        x1[l] = l / quads;
      }
      const uint32_t step_quad = kQuads % quads, step_x1 = kQuads / quads;

      for (int64_t t = 0; t < total; t += kQuads) {
        uint32_t words[kBatch];
        for (int l = 0; l < kQuads; ++l) {
          const Philox4 w = base_words(first_quad + quad[l], s.start1 + x1[l], c2, s.stream, s.key0, s.key1);
          words[4 * l + 0] = w.v[0];
          words[4 * l + 1] = w.v[1];
          words[4 * l + 2] = w.v[2];
          words[4 * l + 3] = w.v[3];
        }
        const bool full = t + kQuads <= total;
        const bool one_row =
            s.start2 % 4 == 0 && x1[0] == x1[kQuads - 1] && 4 * int64_t(quad[kQuads - 1]) + 4 <= s.size2;
        if (full && (rows_touch || one_row)) {
          store_batch(row0 + x1[0] * s.stride1 + 4 * int64_t(quad[0]), words, element);
        } else {
          T values[kBatch];
          store_batch(values, words, element);
          const int count = int(std::min<int64_t>(kQuads, total - t));
          for (int l = 0; l < count; ++l) scatter(row0 + x1[l] * s.stride1, values + 4 * l, quad[l], s);
        }
        for (int l = 0; l < kQuads; ++l) {
          quad[l] += step_quad;
          x1[l] += step_x1;
          const bool wrapped = quad[l] >= quads;
          quad[l] -= wrapped ? quads : 0u;
          x1[l] += wrapped ? 1u : 0u;
        }
      }
    }
  }

  // The up to four elements of one counter that lie inside the row.
  static RANDLORA_INLINE void scatter(T* row, const T* values, uint32_t quad, const BaseSlice& s) {
    const int64_t base = 4 * int64_t(quad) - int64_t(s.start2 % 4);
    const int64_t lo = std::max<int64_t>(0, base), hi = std::min<int64_t>(s.size2, base + 4);
    for (int64_t x2 = lo; x2 < hi; ++x2) row[x2] = values[x2 - base];
  }
};

template <class T, class Element>
void fill(const at::Tensor& out, const BaseSlice& slice, const Element& element) {
  T* const data = advise_large(out).mutable_data_ptr<T>();
  const int64_t per_row = std::max<int64_t>(1, slice.size1 * slice.size2);
  at::parallel_for(0, slice.size0, std::max<int64_t>(1, 32768 / per_row), [&](int64_t begin, int64_t end) {
    run<FillRows<T, Element>>(data, slice, element, begin, end);
  });
}

template <class Element>
void fill_any(const at::Tensor& out, const BaseSlice& slice, const Element& element) {
  if constexpr (!std::is_same_v<Element, DenseElement>)
    if (out.scalar_type() == at::kChar) return fill<int8_t>(out, slice, element);
  with_float_type(out.scalar_type(), [&](auto number) {
    fill<decltype(number)>(out, slice, element);
  });
}

void fill_bases_(const at::Tensor& out, int64_t seed, int64_t stream, c10::IntArrayRef offsets,
                 std::optional<double> sparsity) {
  const BaseSlice slice = make_base_slice(out, seed, stream, offsets, sparsity);
  if (out.numel() == 0) return;
  if (slice.is_signs())
    fill_any(out, slice, SignElement{});
  else if (sparsity.has_value())
    fill_any(out, slice, TernaryElement{ternary_threshold(*sparsity)});
  else
    fill_any(out, slice, DenseElement{});
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, CPU, m) { m.impl("fill_bases_", &fill_bases_); }

}  // namespace randlora::cpu
