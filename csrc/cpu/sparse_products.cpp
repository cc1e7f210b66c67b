// Tokens are taken a vector's width at a time and transposed, so that a feature of all of them is one vector: what a
// non-zero of B or C does is then one vector addition, and the tile of tokens stays in L2 meanwhile.
#include "sparse_products.h"

#include <algorithm>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include "cpu/sparse_column.h"
#include "cpu/vec.h"

namespace randlora::cpu {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One feature of a tile of tokens. Two vectors of 32 bytes: compilers keep sums in wider ones on the stack where the
// instruction set has no wider registers, and what is in L2 does not come faster for wider loads.
template <class Acc>
struct Row {
  typedef Acc Half __attribute__((vector_size(32)));
  Half low = {}, high = {};

  static RANDLORA_INLINE Row load(const Acc* p) {
    Row row;
    row.low = load_bits<Half>(p);
    row.high = load_bits<Half>(p + kLanes<Acc> / 2);
    return row;
  }
  RANDLORA_INLINE void store(Acc* p) const {
    store_bits(p, low);
    store_bits(p + kLanes<Acc> / 2, high);
  }
  RANDLORA_INLINE void operator+=(const Row& other) {
    low += other.low;
    high += other.high;
  }
  RANDLORA_INLINE void operator-=(const Row& other) {
    low -= other.low;
    high -= other.high;
  }
  // *this += other * factor
  RANDLORA_INLINE void add_product(const Row& other, Acc factor) {
    low += other.low * factor;
    high += other.high * factor;
  }
};

// The coefficients of one call, and how h is laid out: its n rows of every k are padded to `padded`, a multiple of the
// lanes, so that blocks of them can be transposed.
template <class Acc>
struct Scaled {
  const SparsePattern& s;
  int64_t padded;
  std::vector<Acc> coefficients;  // [entries of A, padded], of C, in the order of a_entries

  int64_t entries() const { return s.a_starts[s.count]; }

  // lambda [r, n] and gamma transposed, [m, n].
  Scaled(const SparsePattern& s, const Acc* lambda, const Acc* gamma, Acc scale)
      : s(s), padded(divide_up(s.n, kLanes<Acc>) * kLanes<Acc>), coefficients(entries() * padded) {
    for (int64_t c = 0; c < s.count; ++c)
      for (int32_t e = s.a_starts[c]; e < s.a_starts[c + 1]; ++e) {
        const Acc a = s.a_entries[e] & 1 ? -scale : scale;
        const Acc* const l = lambda + int64_t(s.a_entries[e] >> 1) * s.n;
        const Acc* const g = gamma + int64_t(s.columns[c]) * s.n;
        for (int64_t i = 0; i < s.n; ++i) coefficients[e * padded + i] = a * l[i] * g[i];
      }
  }
};

// What a thread works in; a row is one feature of a tile of tokens.
template <class Acc>
struct Scratch {
  std::vector<Acc> small, large, h;  // [m, lanes], [M, lanes], [r * padded, lanes]

  explicit Scratch(const Scaled<Acc>& c)
      : small(c.s.m * kLanes<Acc>), large(c.s.M * kLanes<Acc>), h(c.s.r * c.padded * kLanes<Acc>) {}
};

// A tile of tokens [<= lanes, width] of row-major memory.
template <class T>
struct Tokens {
  T* data;
  int64_t width, count;

  Tokens at(int64_t tile) const {
    constexpr int64_t L = kLanes<acc_t<T>>;
    return {data + tile * L * width, width, std::min(L, count - tile * L)};
  }
};

// ---- the steps; each is a kernel by itself, as compiling every chain of them would take minutes ----

// to [width, lanes]; zeros for tokens that are not there.
template <class T>
struct Read {
  using Acc = acc_t<T>;
  static RANDLORA_INLINE void run(Acc* to, const Tokens<T>& tokens) {
    constexpr int L = kLanes<Acc>;
    Acc block[L * L] = {};
    int64_t f = 0;
    for (; f + L <= tokens.width; f += L) {
      for (int64_t row = 0; row < tokens.count; ++row)
        store(block + row * L, load(tokens.data + row * tokens.width + f));
      transpose(to + f * L, block);
    }
    for (; f < tokens.width; ++f)
      for (int64_t row = 0; row < L; ++row)
        to[f * L + row] = row < tokens.count ? Acc(tokens.data[row * tokens.width + f]) : Acc(0);
  }
};

// tokens += from [width, lanes]
template <class T>
struct Add {
  using Acc = acc_t<T>;
  static RANDLORA_INLINE void run(const Tokens<T>& tokens, const Acc* from) {
    constexpr int L = kLanes<Acc>;
    Acc block[L * L];
    int64_t f = 0;
    for (; f + L <= tokens.width; f += L) {
      transpose(block, from + f * L);
      for (int64_t row = 0; row < tokens.count; ++row) {
        T* const to = tokens.data + row * tokens.width + f;
        store(to, load(to) + load(block + row * L));
      }
    }
    for (; f < tokens.width; ++f)
      for (int64_t row = 0; row < tokens.count; ++row) {
        T* const to = tokens.data + row * tokens.width + f;
        *to = T(Acc(*to) + from[f * L + row]);
      }
  }
};

// h = small C^T
template <class Acc>
struct SmallToH {
  static RANDLORA_INLINE void run(Scratch<Acc>* scratch, const Scaled<Acc>& c) {
    constexpr int L = kLanes<Acc>;
    std::fill(scratch->h.begin(), scratch->h.end(), Acc(0));
    for (int64_t column = 0; column < c.s.count; ++column) {
      const Row<Acc> feature = Row<Acc>::load(scratch->small.data() + c.s.columns[column] * L);
      for (int32_t e = c.s.a_starts[column]; e < c.s.a_starts[column + 1]; ++e) {
        Acc* const h = scratch->h.data() + (c.s.a_entries[e] >> 1) * c.padded * L;
        const Acc* const coefficients = c.coefficients.data() + e * c.padded;
        for (int64_t i = 0; i < c.s.n; ++i) {
          Row<Acc> row = Row<Acc>::load(h + i * L);
          row.add_product(feature, coefficients[i]);
          row.store(h + i * L);
        }
      }
    }
  }
};

// small = h C, where C has a column that is not zero.
template <class Acc>
struct HToSmall {
  static RANDLORA_INLINE void run(Scratch<Acc>* scratch, const Scaled<Acc>& c) {
    constexpr int L = kLanes<Acc>;
    for (int64_t column = 0; column < c.s.count; ++column) {
      Row<Acc> even, odd;  // two sums, so that an addition need not wait for the one before it
      for (int32_t e = c.s.a_starts[column]; e < c.s.a_starts[column + 1]; ++e) {
        const Acc* const h = scratch->h.data() + (c.s.a_entries[e] >> 1) * c.padded * L;
        const Acc* const coefficients = c.coefficients.data() + e * c.padded;
        int64_t i = 0;
        for (; i + 2 <= c.s.n; i += 2) {
          even.add_product(Row<Acc>::load(h + i * L), coefficients[i]);
          odd.add_product(Row<Acc>::load(h + (i + 1) * L), coefficients[i + 1]);
        }
        if (i < c.s.n) even.add_product(Row<Acc>::load(h + i * L), coefficients[i]);
      }
      even += odd;
      even.store(scratch->small.data() + c.s.columns[column] * L);
    }
  }
};

// large = h B2^T
template <class Acc, class Index>
struct HToLarge {
  static RANDLORA_INLINE void run(Scratch<Acc>* scratch, const Scaled<Acc>& c) {
    constexpr int L = kLanes<Acc>;
    Acc* const large = scratch->large.data();
    std::fill(scratch->large.begin(), scratch->large.end(), Acc(0));
    for (int64_t k = 0; k < c.s.r; ++k)
      for (int64_t i = 0; i < c.s.n; ++i) {
        const Row<Acc> h = Row<Acc>::load(scratch->h.data() + (k * c.padded + i) * L);
        const Column<Index> b(c.s, k * c.s.n + i);
        for (const Index* o = b.plus; o < b.plus_end; ++o) {
          Acc* const to = large + int64_t(*o) * L;
          Row<Acc> row = Row<Acc>::load(to);
          row += h;
          row.store(to);
        }
        for (const Index* o = b.minus; o < b.minus_end; ++o) {
          Acc* const to = large + int64_t(*o) * L;
          Row<Acc> row = Row<Acc>::load(to);
          row -= h;
          row.store(to);
        }
      }
  }
};

// h = large B2
template <class Acc, class Index>
struct LargeToH {
  static RANDLORA_INLINE void run(Scratch<Acc>* scratch, const Scaled<Acc>& c) {
    constexpr int L = kLanes<Acc>;
    const Acc* const large = scratch->large.data();
    for (int64_t k = 0; k < c.s.r; ++k)
      for (int64_t i = 0; i < c.s.n; ++i) {
        Row<Acc> plus, minus;
        const Column<Index> b(c.s, k * c.s.n + i);
        for (const Index* o = b.plus; o < b.plus_end; ++o) plus += Row<Acc>::load(large + int64_t(*o) * L);
        for (const Index* o = b.minus; o < b.minus_end; ++o) minus += Row<Acc>::load(large + int64_t(*o) * L);
        plus -= minus;
        plus.store(scratch->h.data() + (k * c.padded + i) * L);
      }
  }
};

// t [entries, padded] += h^T small where C is not zero. Blocks of h are transposed in place: a vector is then what one
// token has for `lanes` of the bases i, and no sum runs across lanes.
template <class Acc>
struct AddGradient {
  static RANDLORA_INLINE void run(Acc* t, Scratch<Acc>* scratch, const Scaled<Acc>& c) {
    constexpr int L = kLanes<Acc>;
    for (int64_t first = 0; first < c.s.r * c.padded; first += L) {
      Acc block[L * L];
      std::copy_n(scratch->h.data() + first * L, L * L, block);
      transpose(scratch->h.data() + first * L, block);
    }
    for (int64_t column = 0; column < c.s.count; ++column) {
      const Acc* const feature = scratch->small.data() + c.s.columns[column] * L;
      for (int32_t e = c.s.a_starts[column]; e < c.s.a_starts[column + 1]; ++e) {
        const Acc* const h = scratch->h.data() + (c.s.a_entries[e] >> 1) * c.padded * L;
        for (int64_t i = 0; i < c.padded; i += L) {
          Acc* const to = t + e * c.padded + i;
          Row<Acc> even = Row<Acc>::load(to), odd;
          for (int token = 0; token < L; token += 2) {
            even.add_product(Row<Acc>::load(h + (i + token) * L), feature[token]);
            odd.add_product(Row<Acc>::load(h + (i + token + 1) * L), feature[token + 1]);
          }
          even += odd;
          even.store(to);
        }
      }
    }
  }
};

template <class T, class Index>
void up(Scratch<acc_t<T>>* scratch, const Scaled<acc_t<T>>& c, const Tokens<T>& large, const Tokens<T>& small) {
  using Acc = acc_t<T>;
  cpu::run<Read<T>>(scratch->small.data(), small);
  cpu::run<SmallToH<Acc>>(scratch, c);
  cpu::run<HToLarge<Acc, Index>>(scratch, c);
  cpu::run<Add<T>>(large, scratch->large.data());
}

// t, `into.data` and `small.data` may be null, for what is not asked for.
template <class T, class Index>
void down(Scratch<acc_t<T>>* scratch, const Scaled<acc_t<T>>& c, const Tokens<T>& large, const Tokens<T>& small,
          const Tokens<T>& into, acc_t<T>* t) {
  using Acc = acc_t<T>;
  cpu::run<Read<T>>(scratch->large.data(), large);
  cpu::run<LargeToH<Acc, Index>>(scratch, c);
  if (into.data) {
    if (t) std::fill(scratch->small.begin(), scratch->small.end(), Acc(0));
    cpu::run<HToSmall<Acc>>(scratch, c);
    cpu::run<Add<T>>(into, scratch->small.data());
  }
  if (t) {
    cpu::run<Read<T>>(scratch->small.data(), small);
    cpu::run<AddGradient<Acc>>(t, scratch, c);
  }
}

// function(T{}, Index{})
template <class Function>
void with_types(at::ScalarType type, bool short_indices, const Function& function) {
  const auto with_index = [&](auto t) {
    short_indices ? function(t, uint16_t{}) : function(t, int32_t{});
  };
  switch (type) {
    case at::kDouble: return with_index(double{});
    case at::kFloat: return with_index(float{});
    case at::kBFloat16: return with_index(c10::BFloat16{});
    default: return with_index(c10::Half{});
  }
}

// lambda [r, n] and gamma transposed, [m, n], in the type that sums have.
struct Parameters {
  at::Tensor lambda, gamma;

  Parameters(const at::Tensor& lambda, const at::Tensor& gamma, at::ScalarType tokens)
      : lambda(lambda.to(type(tokens)).contiguous()), gamma(gamma.to(type(tokens)).t().contiguous()) {}

  static at::ScalarType type(at::ScalarType tokens) { return tokens == at::kDouble ? at::kDouble : at::kFloat; }
};

// Data that is written, or read only; null for a tensor that is not there.
template <class T>
Tokens<T> tokens_of(const std::optional<at::Tensor>& t) {
  if (!t.has_value()) return {nullptr, 0, 0};
  return {const_cast<T*>(t->const_data_ptr<T>()), t->size(1), t->size(0)};
}

void check_tokens(const at::Tensor& large, const at::Tensor& small, const SparsePattern& s) {
  TORCH_INTERNAL_ASSERT(large.dim() == 2 && small.dim() == 2 && large.size(0) == small.size(0) &&
                        large.size(1) == s.M && small.size(1) == s.m && large.scalar_type() == small.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> down(const std::optional<at::Tensor>& into, const at::Tensor& large,
                                        const std::optional<at::Tensor>& small, at::TensorList pattern,
                                        const at::Tensor& lambda, const at::Tensor& gamma, double scale) {
  const SparsePattern s = check_pattern(pattern, lambda, gamma, large.size(1));
  check_tokens(large, into.has_value() ? *into : *small, s);
  TORCH_INTERNAL_ASSERT(!into.has_value() || into->is_contiguous());
  const at::Tensor rows = large.contiguous();
  const std::optional<at::Tensor> others = small.has_value() ? std::optional(small->contiguous()) : std::nullopt;
  const Parameters p(lambda, gamma, large.scalar_type());
  const bool gradients = small.has_value();
  const at::Tensor dlambda = at::zeros({gradients ? s.r : 0, s.n}, p.lambda.options());
  const at::Tensor dgamma = at::zeros({gradients ? s.m : 0, s.n}, p.gamma.options());
  with_types(large.scalar_type(), s.short_indices, [&](auto type, auto index) {
    using T = decltype(type);
    using Acc = acc_t<T>;
    const Acc *l = p.lambda.const_data_ptr<Acc>(), *g = p.gamma.const_data_ptr<Acc>();
    const Scaled<Acc> c(s, l, g, Acc(scale));
    const int64_t tiles = divide_up(large.size(0), kLanes<Acc>);
    // Groups of tiles, each with sums of its own, that do not depend on the number of threads.
    const int64_t groups = gradients ? std::clamp<int64_t>(tiles / 4, 1, 16) : tiles;
    const int64_t size = c.entries() * c.padded;
    std::vector<Acc> t(gradients ? groups * size : 0);
    at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      Scratch<Acc> scratch(c);
      for (int64_t group = begin; group < end; ++group) {
        Acc* const sums = gradients ? t.data() + group * size : nullptr;
        for (int64_t tile = group * tiles / groups; tile < (group + 1) * tiles / groups; ++tile)
          down<T, decltype(index)>(&scratch, c, tokens_of<T>(rows).at(tile), tokens_of<T>(others).at(tile),
                                   tokens_of<T>(into).at(tile), sums);
      }
    });
    if (!gradients) return;
    for (int64_t group = 1; group < groups; ++group)
      for (int64_t e = 0; e < size; ++e) t[e] += t[group * size + e];
    Acc *const dl = dlambda.mutable_data_ptr<Acc>(), *const dg = dgamma.mutable_data_ptr<Acc>();
    for (int64_t column = 0; column < s.count; ++column)
      for (int32_t e = s.a_starts[column]; e < s.a_starts[column + 1]; ++e) {
        const Acc a = s.a_entries[e] & 1 ? Acc(-scale) : Acc(scale);
        const int64_t k = s.a_entries[e] >> 1, j = s.columns[column];
        for (int64_t i = 0; i < s.n; ++i) {
          const Acc value = a * t[e * c.padded + i];
          dl[k * s.n + i] += value * g[j * s.n + i];
          dg[j * s.n + i] += value * l[k * s.n + i];
        }
      }
  });
  return {dlambda, dgamma.t()};
}

}  // namespace

void sparse_up(const at::Tensor& large, const at::Tensor& small, at::TensorList pattern, const at::Tensor& lambda,
               const at::Tensor& gamma, double scale) {
  const SparsePattern s = check_pattern(pattern, lambda, gamma, large.size(1));
  check_tokens(large, small, s);
  TORCH_INTERNAL_ASSERT(large.is_contiguous());
  const at::Tensor rows = small.contiguous();
  const Parameters p(lambda, gamma, small.scalar_type());
  with_types(small.scalar_type(), s.short_indices, [&](auto type, auto index) {
    using T = decltype(type);
    using Acc = acc_t<T>;
    const Scaled<Acc> c(s, p.lambda.const_data_ptr<Acc>(), p.gamma.const_data_ptr<Acc>(), Acc(scale));
    at::parallel_for(0, divide_up(small.size(0), kLanes<Acc>), 1, [&](int64_t begin, int64_t end) {
      Scratch<Acc> scratch(c);
      for (int64_t tile = begin; tile < end; ++tile)
        up<T, decltype(index)>(&scratch, c, tokens_of<T>(large).at(tile), tokens_of<T>(rows).at(tile));
    });
  });
}

void sparse_down(const at::Tensor& into, const at::Tensor& large, at::TensorList pattern, const at::Tensor& lambda,
                 const at::Tensor& gamma, double scale) {
  down(into, large, std::nullopt, pattern, lambda, gamma, scale);
}

std::tuple<at::Tensor, at::Tensor> sparse_gradients(const std::optional<at::Tensor>& into, const at::Tensor& large,
                                                    const at::Tensor& small, at::TensorList pattern,
                                                    const at::Tensor& lambda, const at::Tensor& gamma, double scale) {
  return down(into, large, small, pattern, lambda, gamma, scale);
}

}  // namespace randlora::cpu
