// randlora::fill_bases_ against a generator written straight from its definition, one element at a time and sharing
// no code with the library: any slice, any offset, every kind and dtype, bit for bit.
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/full.h>

#include "check.h"

namespace {

// One word of Philox4x32-10 as the paper writes it: ten rounds, the key bumped between them.
uint32_t naive_word(const uint32_t (&counter)[4], uint64_t seed, int lane) {
  uint32_t x[4] = {counter[0], counter[1], counter[2], counter[3]};
  uint32_t k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    if (round > 0) {
      k[0] += 0x9E3779B9u;
      k[1] += 0xBB67AE85u;
    }
    const uint64_t a = 0xD2511F53ull * x[0], b = 0xCD9E8D57ull * x[2];
    const uint32_t next[4] = {uint32_t(b >> 32) ^ x[1] ^ k[0], uint32_t(b), uint32_t(a >> 32) ^ x[3] ^ k[1],
                              uint32_t(a)};
    for (int i = 0; i < 4; ++i) x[i] = next[i];
  }
  return x[lane];
}

// Element [x0, x1, x2] of the base: A is stream 0 with (k, 0, j), B is stream 1 with (o, i, k).
float naive_element(int64_t stream, int64_t x0, int64_t x1, int64_t x2, int64_t seed, std::optional<double> sparsity) {
  const uint32_t counter[4] = {uint32_t(x2 / 4), uint32_t(x1), uint32_t(x0), uint32_t(stream)};
  const uint32_t u = naive_word(counter, uint64_t(seed), int(x2 % 4));
  if (sparsity.has_value()) {
    const uint64_t t = uint64_t(std::floor(4294967296.0 / (2.0 * *sparsity)));
    return u < t ? -1.0f : u >= 4294967296ull - t ? 1.0f : 0.0f;
  }
  const float c = float(std::sqrt(3.0) / 16777216.0);
  const int64_t q = int64_t(u >> 8) - 8388608;
  return float(2 * q + 1) * c;
}

void fill_bases_(const at::Tensor& out, int64_t seed, int64_t stream, c10::IntArrayRef offsets,
                 std::optional<double> sparsity) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("randlora::fill_bases_", "")
          .typed<void(const at::Tensor&, int64_t, int64_t, c10::IntArrayRef, std::optional<double>)>();
  op.call(out, seed, stream, offsets, sparsity);
}

struct Slice {
  int64_t stream;
  std::vector<int64_t> sizes, offsets;
};

const std::vector<Slice> kSlices = {
    {0, {1, 1, 1}, {0, 0, 0}},    {0, {3, 1, 41}, {0, 0, 0}},      {0, {32, 1, 1000}, {0, 0, 0}},
    {0, {2, 1, 341}, {5, 0, 3}},  {0, {1, 1, 130}, {0, 0, 70000}}, {1, {1, 1, 1}, {0, 0, 0}},
    {1, {41, 3, 8}, {0, 0, 0}},   {1, {5, 7, 3}, {0, 0, 0}},       {1, {3, 2, 341}, {9, 11, 2}},
    {1, {65, 11, 32}, {0, 0, 0}}, {1, {4, 5, 6}, {1000, 64, 5}},   {1, {2, 3, 1}, {2147483645, 0, 0}},
    {0, {0, 1, 8}, {0, 0, 0}},
};

constexpr int64_t kSeeds[] = {0, 42, -1, 0x0123456789abcdef};

template <class T>
void compare(const Slice& slice, int64_t seed, at::ScalarType dtype, std::optional<double> sparsity) {
  // Two columns more than asked for, so that rows do not touch; what lies outside the slice must stay as it was.
  const int64_t width = slice.sizes[2];
  const at::Tensor whole = at::full({slice.sizes[0], slice.sizes[1], width + 2}, 77, dtype);
  fill_bases_(whole.slice(2, 0, width), seed, slice.stream, slice.offsets, sparsity);
  const at::Tensor packed = at::full(slice.sizes, 77, dtype);
  fill_bases_(packed, seed, slice.stream, slice.offsets, sparsity);

  const auto strided = whole.accessor<T, 3>(), contiguous = packed.accessor<T, 3>();
  for (int64_t a = 0; a < slice.sizes[0]; ++a)
    for (int64_t b = 0; b < slice.sizes[1]; ++b) {
      for (int64_t c = 0; c < width; ++c) {
        const T expected = T(naive_element(slice.stream, slice.offsets[0] + a, slice.offsets[1] + b,
                                           slice.offsets[2] + c, seed, sparsity));
        CHECK_THAT(strided[a][b][c] == expected && contiguous[a][b][c] == expected, dtype, " stream ", slice.stream,
                   " seed ", seed, " element [", a, ", ", b, ", ", c, "] of ", packed.sizes(), " at offset ",
                   c10::IntArrayRef(slice.offsets), ": got ", double(strided[a][b][c]), " (rows apart) and ",
                   double(contiguous[a][b][c]), ", expected ", double(expected));
      }
      CHECK_THAT(strided[a][b][width] == T(77) && strided[a][b][width + 1] == T(77), "wrote beyond row [", a, ", ", b,
                 "]");
    }
}

template <class T>
void compare_all(at::ScalarType dtype, const std::vector<std::optional<double>>& sparsities) {
  for (const Slice& slice : kSlices)
    for (const int64_t seed : kSeeds)
      for (const std::optional<double>& sparsity : sparsities) compare<T>(slice, seed, dtype, sparsity);
}

void larger_contains_smaller() {
  const at::Tensor large = at::full({9, 5, 40}, 0, at::kFloat), small = at::full({4, 2, 23}, 0, at::kFloat);
  fill_bases_(large, 7, 1, {0, 0, 0}, std::nullopt);
  fill_bases_(small, 7, 1, {0, 0, 0}, std::nullopt);
  CHECK_THAT(small.equal(large.slice(0, 0, 4).slice(1, 0, 2).slice(2, 0, 23)), "a base of ", large.sizes(),
             " does not begin with the base of ", small.sizes());
}

template <class Call>
bool throws(const Call& call) {
  try {
    call();
  } catch (const c10::Error&) {
    return true;
  }
  return false;
}

void bad_arguments() {
  const at::Tensor out = at::full({2, 1, 4}, 0, at::kFloat);
  const auto fill = [](const at::Tensor& t, int64_t stream, c10::IntArrayRef offsets, std::optional<double> sparsity) {
    return throws([&] {
      fill_bases_(t, 0, stream, offsets, sparsity);
    });
  };
  CHECK_THAT(!fill(out, 0, {0, 0, 0}, std::nullopt), "the call that the others vary is refused");
  CHECK_THAT(fill(out.select(1, 0), 0, {0, 0, 0}, std::nullopt), "a matrix is accepted");
  CHECK_THAT(fill(out, 2, {0, 0, 0}, std::nullopt), "stream 2 is accepted");
  CHECK_THAT(fill(out, 0, {0, 0}, std::nullopt), "two offsets are accepted");
  CHECK_THAT(fill(out, 0, {-1, 0, 0}, std::nullopt), "a negative offset is accepted");
  CHECK_THAT(fill(out, 0, {0, 0, 0}, 0.5), "a sparsity below 1 is accepted");
  CHECK_THAT(fill(out.to(at::kChar), 0, {0, 0, 0}, std::nullopt), "a dense base in int8 is accepted");
  CHECK_THAT(fill(out.to(at::kInt), 0, {0, 0, 0}, std::nullopt), "int32 is accepted");
}

}  // namespace

int main() {
  // No zeros, one in three, and a very sparse base of smallest dimension 1000.
  const std::vector<std::optional<double>> ternary = {1.0, 3.0, std::sqrt(1000.0)};
  std::vector<std::optional<double>> all = ternary;
  all.push_back(std::nullopt);

  check::run("fill_bases_ float64", [&] {
    compare_all<double>(at::kDouble, all);
  });
  check::run("fill_bases_ float32", [&] {
    compare_all<float>(at::kFloat, all);
  });
  check::run("fill_bases_ bfloat16", [&] {
    compare_all<at::BFloat16>(at::kBFloat16, all);
  });
  check::run("fill_bases_ float16", [&] {
    compare_all<at::Half>(at::kHalf, all);
  });
  check::run("fill_bases_ int8", [&] {
    compare_all<int8_t>(at::kChar, ternary);
  });
  check::run("a larger base contains the smaller one", larger_contains_smaller);
  check::run("bad arguments are refused", bad_arguments);
  return check::finish();
}
