// The update of Hadamard bases on the CPU. A thread takes tiles of tokens that stay in its L2: the small products of
// all tokens of a tile, then transforms token by token in L1. Each token's sums have one order, whatever its tile.
#include "hadamard.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/hadamard_few.h"
#include "cpu/hadamard_layer.h"
#include "cpu/hadamard_products.h"
#include "cpu/hadamard_sums.h"
#include "cpu/hadamard_tokens.h"
#include "cpu/hadamard_transform.h"
#include "ops.h"

namespace randlora::cpu {
namespace {

// Bytes of a tile, at most and unless a few tokens take more.
constexpr int64_t kTileBytes = int64_t{1} << 20;

// Room for a tile.
template <class Acc>
struct Scratch {
  const int64_t narrow_row, hidden_row;
  const Buffer<Acc> narrow, hidden;    // [tokens, R, columns], [tokens, R, bases]
  const Buffer<Acc> row, wide, wide2;  // [m], of one token each

  Scratch(const HadamardLayer<Acc>& layer, int64_t tokens)
      : narrow_row(layer.narrow_row()),
        hidden_row(layer.hidden_row()),
        narrow(tokens * narrow_row),
        hidden(tokens * hidden_row),
        row(layer.s.m),
        wide(layer.hidden),
        wide2(layer.hidden) {
    std::fill_n(wide.data(), layer.hidden, Acc(0));
  }

  Acc* narrow_at(int64_t token) const { return narrow.data() + token * narrow_row; }
  Acc* hidden_at(int64_t token) const { return hidden.data() + token * hidden_row; }
};

// The steps on a tile of tokens of type T.
template <class T>
class Tile {
 public:
  using Acc = acc_t<T>;

  Tile(const HadamardLayer<Acc>& layer, const Scratch<Acc>& scratch, int64_t first, int64_t count)
      : layer_(layer), s_(layer.s), scratch_(scratch), first_(first), count_(count) {}

  // u of x, in place of what scratch.hidden was
  void narrow_to_hidden(const T* x, const Acc* packed) const {
    for (int64_t t = 0; t < count_; ++t)
      cpu::run<ReadNarrow<T>>(scratch_.narrow_at(t), x + (first_ + t) * s_.m, scratch_.row.data(), s_, layer_.columns);
    for (int64_t g = 0; g < s_.R; ++g)
      multiply_panels<Acc>(scratch_.hidden_at(0) + g * layer_.bases, scratch_.hidden_row,
                           scratch_.narrow_at(0) + g * layer_.columns, scratch_.narrow_row,
                           packed + g * s_.columns * layer_.bases, count_, s_.columns, layer_.bases);
  }

  // y of du
  void hidden_to_narrow(T* y, const Acc* packed) const {
    for (int64_t g = 0; g < s_.R; ++g)
      multiply_panels<Acc>(scratch_.narrow_at(0) + g * layer_.columns, scratch_.narrow_row,
                           scratch_.hidden_at(0) + g * layer_.bases, scratch_.hidden_row,
                           packed + g * layer_.down_group(), count_, s_.n, layer_.columns);
    for (int64_t t = 0; t < count_; ++t)
      cpu::run<AddNarrow<T>>(y + (first_ + t) * s_.m, static_cast<const Acc*>(scratch_.narrow_at(t)),
                             scratch_.row.data(), s_, layer_.columns);
  }

  // y of u
  void hidden_to_wide(T* y) const {
    for (int64_t t = 0; t < count_; ++t) {
      transform_rows(scratch_.hidden_at(t), s_.R, layer_.bases);
      add_wide(y, t, scratch_.hidden_at(t), scratch_.wide.data());
    }
  }

  // du of x
  void wide_to_hidden(const T* x) const {
    for (int64_t t = 0; t < count_; ++t) {
      read_wide(x, t);
      cpu::run<UnscaleHidden<Acc>>(scratch_.hidden_at(t), scratch_.wide.data(), lambda(), s_, layer_.bases,
                                   layer_.length);
      transform_rows(scratch_.hidden_at(t), s_.R, layer_.bases);
    }
  }

  // du of x where u was; dlambda [r, bases] without scale and c is added to `sums`, y of u to `y` unless that is null.
  void gradients_of_hidden(const T* x, Acc* sums, T* y) const {
    for (int64_t t = 0; t < count_; ++t) {
      Acc* const hidden = scratch_.hidden_at(t);
      transform_rows(hidden, s_.R, layer_.bases);
      if (y) add_wide(y, t, hidden, scratch_.wide2.data());
      read_wide(x, t);
      cpu::run<GradientsOfHidden<Acc>>(sums, hidden, scratch_.wide.data(), lambda(), s_, layer_.bases, layer_.length);
      transform_rows(hidden, s_.R, layer_.bases);
    }
  }

  // dgamma [R, columns, bases] without a
  void gradients_of_gamma(Acc* sums, bool add) const {
    for (int64_t g = 0; g < s_.R; ++g)
      multiply(Product<Acc>{sums + g * s_.columns * layer_.bases, layer_.bases,
                            scratch_.narrow_at(0) + g * layer_.columns, 1, scratch_.narrow_row,
                            scratch_.hidden_at(0) + g * layer_.bases, scratch_.hidden_row, s_.columns, count_,
                            layer_.bases, add});
  }

 private:
  const Acc* lambda() const { return layer_.lambda.data(); }

  void add_wide(T* y, int64_t t, const Acc* v, Acc* h) const {
    cpu::run<ScaleHidden<Acc>>(h, v, lambda(), s_, layer_.bases, layer_.length);
    transform_vector(h, layer_.length);
    cpu::run<AddWide<T>>(y + (first_ + t) * s_.M, static_cast<const Acc*>(h), static_cast<const Acc*>(layer_.b.data()),
                         s_.M, layer_.length);
  }

  void read_wide(const T* x, int64_t t) const {
    cpu::run<ReadWide<T>>(scratch_.wide.data(), x + (first_ + t) * s_.M, static_cast<const Acc*>(layer_.b.data()), s_.M,
                          layer_.length);
    transform_vector(scratch_.wide.data(), layer_.length);
  }

  const HadamardLayer<Acc>& layer_;
  const HadamardShape& s_;
  const Scratch<Acc>& scratch_;
  const int64_t first_, count_;
};

template <class Acc>
int64_t tile_of(const HadamardLayer<Acc>& layer, int64_t tokens, int64_t parts) {
  const int64_t most = kTileBytes / ((layer.narrow_row() + layer.hidden_row()) * int64_t(sizeof(Acc)));
  return std::min(std::clamp<int64_t>(round_up(most, 8), 16, 64),
                  std::max<int64_t>(8, round_up(divide_up(tokens, parts), 8)));
}

// function(first, count, scratch) for all tiles of tokens, by all threads.
template <class Acc, class Function>
void for_tiles(const HadamardLayer<Acc>& layer, int64_t tokens, const Function& function) {
  const int64_t tile = tile_of(layer, tokens, at::get_num_threads());
  at::parallel_for(0, divide_up(tokens, tile), 1, [&](int64_t begin, int64_t end) {
    const Scratch<Acc> scratch(layer, tile);
    for (int64_t t = begin * tile; t < std::min(tokens, end * tile); t += tile)
      function(t, std::min(tile, tokens - t), scratch);
  });
}

void up(const at::Tensor& out, const at::Tensor& x, at::TensorList pattern, const at::Tensor& lambda,
        const at::Tensor& gamma, double scale) {
  const SkipAutogradAndAutocast guard;
  const HadamardShape s = check_hadamard_tokens(x, out, pattern, lambda, gamma);
  const int64_t tokens = x.size(0);
  if (tokens == 0) return;
  with_layer(x.scalar_type(), s, lambda, gamma, scale, [&](auto type, const auto& layer) {
    using T = decltype(type);
    const T* const from = x.const_data_ptr<T>();
    T* const to = out.mutable_data_ptr<T>();
    if (tokens <= kFew) return up_few(layer, to, from, tokens);
    const auto packed = layer.pack_up();
    for_tiles(layer, tokens, [&](int64_t first, int64_t count, const auto& scratch) {
      const Tile<T> tile(layer, scratch, first, count);
      tile.narrow_to_hidden(from, packed.data());
      tile.hidden_to_wide(to);
    });
  });
}

void down(const at::Tensor& out, const at::Tensor& x, at::TensorList pattern, const at::Tensor& lambda,
          const at::Tensor& gamma, double scale) {
  const SkipAutogradAndAutocast guard;
  const HadamardShape s = check_hadamard_tokens(out, x, pattern, lambda, gamma);
  const int64_t tokens = x.size(0);
  if (tokens == 0) return;
  with_layer(x.scalar_type(), s, lambda, gamma, scale, [&](auto type, const auto& layer) {
    using T = decltype(type);
    const T* const from = x.const_data_ptr<T>();
    T* const to = out.mutable_data_ptr<T>();
    if (tokens <= kFew) return down_few(layer, to, from, tokens);
    const auto packed = layer.pack_down();
    for_tiles(layer, tokens, [&](int64_t first, int64_t count, const auto& scratch) {
      const Tile<T> tile(layer, scratch, first, count);
      tile.wide_to_hidden(from);
      tile.hidden_to_narrow(to, packed.data());
    });
  });
}

std::tuple<at::Tensor, at::Tensor> gradients(const at::Tensor& narrow, const at::Tensor& wide,
                                             const std::optional<at::Tensor>& into_narrow,
                                             const std::optional<at::Tensor>& into_wide, at::TensorList pattern,
                                             const at::Tensor& lambda, const at::Tensor& gamma, double scale) {
  const SkipAutogradAndAutocast guard;
  const HadamardShape s = check_hadamard_gradients(narrow, wide, into_narrow, into_wide, pattern, lambda, gamma);
  const auto options = gamma.options().dtype(sum_type(narrow.scalar_type()));
  const at::Tensor dlambda = at::empty({s.r, s.n}, options), dgamma = at::empty({s.n, s.m}, options);
  const int64_t tokens = narrow.size(0);
  if (tokens == 0) return {dlambda.zero_(), dgamma.zero_()};
  with_layer(narrow.scalar_type(), s, lambda, gamma, scale, [&](auto type, const auto& layer) {
    using T = decltype(type);
    using Acc = acc_t<T>;
    const auto packed = layer.pack_up();
    const auto packed_down = into_narrow.has_value() ? std::optional(layer.pack_down()) : std::nullopt;
    T* const narrow_to = into_narrow.has_value() ? into_narrow->mutable_data_ptr<T>() : nullptr;
    T* const wide_to = into_wide.has_value() ? into_wide->mutable_data_ptr<T>() : nullptr;
    // Groups of tiles, each with sums of its own, that do not depend on the number of threads.
    const int64_t tile = tile_of(layer, tokens, 4), tiles = divide_up(tokens, tile);
    const HadamardSums<Acc> sums(layer, tokens, tiles);
    at::parallel_for(0, sums.groups, 1, [&](int64_t begin, int64_t end) {
      const Scratch<Acc> scratch(layer, tile);
      for (int64_t group = begin; group < end; ++group) {
        Acc* const dl = sums.dlambda_of(group);
        std::fill_n(dl, s.r * layer.bases, Acc(0));
        const int64_t start = group * tiles / sums.groups * tile;
        const int64_t stop = std::min(tokens, (group + 1) * tiles / sums.groups * tile);
        for (int64_t t = start; t < stop; t += tile) {
          const Tile<T> work(layer, scratch, t, std::min(tile, stop - t));
          work.narrow_to_hidden(narrow.const_data_ptr<T>(), packed.data());
          work.gradients_of_hidden(wide.const_data_ptr<T>(), dl, wide_to);
          work.gradients_of_gamma(sums.dgamma_of(group), t != start);
          if (narrow_to) work.hidden_to_narrow(narrow_to, packed_down->data());
        }
      }
    });
    sums.write(dlambda.mutable_data_ptr<Acc>(), dgamma.mutable_data_ptr<Acc>());
  });
  return {dlambda, dgamma};
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, CPU, m) {
  m.impl("hadamard_up_", &up);
  m.impl("hadamard_down_", &down);
  m.impl("hadamard_gradients", &gradients);
}

}  // namespace randlora::cpu
