// Hadamard bases on CUDA: the ops of hadamard.h. See cuda/hadamard.cuh for how they go about it.
#include "cuda/hadamard.cuh"

#include <algorithm>
#include <optional>
#include <tuple>

#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ops.h"
#include "parameter_gradients.h"

namespace randlora::cuda {
namespace {

using Gradients = std::tuple<at::Tensor, at::Tensor>;

// One layer and the work memory of a call.
template <class T>
class Call {
 public:
  using Acc = acc_t<T>;

  Call(const HadamardShape& s, const at::Tensor& lambda, const at::Tensor& gamma, double scale)
      : l_(hadamard_layout<T>(s)),
        options_(gamma.options()),
        sums_(gamma.options().dtype(c10::CppTypeToScalarType<Acc>::value)),
        lambda_(lambda.to(sums_.dtype()).contiguous()),
        gamma_(gamma.to(sums_.dtype()).contiguous()),
        R_(s.R) {
    options_ = options_.dtype(c10::CppTypeToScalarType<T>::value);
    table_ = at::empty({R_ * l_.n}, sums_);
    p_ = {lambda_.const_data_ptr<Acc>(), gamma_.const_data_ptr<Acc>(), Acc(scale), table_.mutable_data_ptr<Acc>(),
          nullptr};
  }

  // wide += the update of narrow
  void up(const at::Tensor& wide, const at::Tensor& narrow) {
    const int64_t tokens = narrow.size(0);
    if (few(tokens)) {
      make_u(tokens);
      few_products_up(l_, p_, data(u_), narrow.const_data_ptr<T>(), tokens);
      transform_groups(l_, data(u_), tokens);
      return spread(l_, wide.mutable_data_ptr<T>(), data(u_), table(), tokens);
    }
    make_products(tokens);
    make_u(tokens);
    for_chunks(tokens, [&](int64_t first, int64_t count) {
      hidden(narrow, first, count);
      spread(l_, wide.mutable_data_ptr<T>() + first * l_.M, data(u_), table(), count);
    });
  }

  // narrow += the update of wide
  void down(const at::Tensor& narrow, const at::Tensor& wide) {
    const int64_t tokens = narrow.size(0);
    const bool by_few = few(tokens);
    if (!by_few) make_products(tokens);
    make_u(tokens);
    group<T>(l_, p_, true, nullptr, nullptr, 0);
    for_chunks(tokens, [&](int64_t first, int64_t count) {
      collect<T>(l_, wide.const_data_ptr<T>() + first * l_.M, data(u_), table(), nullptr, 0, false, count);
      transform_groups(l_, data(u_), count);
      T* const out = narrow.mutable_data_ptr<T>() + first * l_.m;
      if (by_few)
        few_products_down(l_, p_, out, data(u_), count);
      else
        add_down(out, count);
    });
  }

  Gradients gradients(const at::Tensor& narrow, const at::Tensor& wide, const std::optional<at::Tensor>& into_narrow,
                      const std::optional<at::Tensor>& into_wide) {
    const int64_t tokens = narrow.size(0);
    if (tokens == 0) return {at::zeros({l_.r, l_.n}, sums_), at::zeros({l_.n, l_.m}, sums_)};
    const at::Tensor dlambda = at::empty({l_.r, l_.n}, sums_), dgamma = at::empty({l_.n, l_.m}, sums_);
    const int64_t rows = collect_rows(l_, std::min(tokens, l_.chunk));
    const at::Tensor partial = at::empty({rows, l_.P}, sums_), grouped = at::empty({R_, l_.n_padded, l_.K}, sums_);
    make_products(tokens);
    make_u(tokens);
    for_chunks(tokens, [&](int64_t first, int64_t count) {
      hidden(narrow, first, count);
      if (into_wide.has_value()) spread(l_, into_wide->mutable_data_ptr<T>() + first * l_.M, data(u_), table(), count);
      collect(l_, wide.const_data_ptr<T>() + first * l_.M, data(u_), table(), partial.mutable_data_ptr<Acc>(), rows,
              first == 0, count);
      transform_groups(l_, data(u_), count);
      product(grouped, u_.narrow(0, 0, count).permute({1, 2, 0}), x_.narrow(0, 0, count).transpose(0, 1));
      if (into_narrow.has_value()) add_down(into_narrow->mutable_data_ptr<T>() + first * l_.m, count);
      const bool last = first + count == tokens;
      finish_gradients<Acc>(l_, dgamma.mutable_data_ptr<Acc>(), grouped.const_data_ptr<Acc>(), first > 0,
                            last ? dlambda.mutable_data_ptr<Acc>() : nullptr, partial.const_data_ptr<Acc>(), rows,
                            p_.scale);
    });
    return {dlambda, dgamma};
  }

  // out [m, M] = D or weight + D; by unit vectors, whose u is written down. What is not rows of sums gets them a chunk
  // at a time.
  void update(const at::Tensor& out, const std::optional<at::Tensor>& weight) {
    const bool direct = out.scalar_type() == c10::CppTypeToScalarType<T>::value && out.stride(1) == 1;
    group<T>(l_, p_, true, nullptr, nullptr, 0);
    make_u(l_.m);
    const at::Tensor rows = direct ? out : at::empty({u_.size(0), l_.M}, sums_);
    for_chunks(l_.m, [&](int64_t first, int64_t count) {
      const at::Tensor sum = rows.narrow(0, direct ? first : 0, count);
      if (weight.has_value())
        sum.copy_(weight->narrow(0, first, count));
      else
        sum.zero_();
      unit_products_up<T>(l_, data(u_), p_.gamma, first, count);
      transform_groups(l_, data(u_), count);
      spread(l_, sum.mutable_data_ptr<T>(), data(u_), table(), count);
      if (!direct) out.narrow(0, first, count).copy_(sum);
    });
  }

  Gradients update_gradients(const at::Tensor& grad) {
    const at::Tensor dlambda = at::empty({l_.r, l_.n}, sums_), dgamma = at::empty({l_.n, l_.m}, sums_);
    const int64_t rows = collect_rows(l_, std::min<int64_t>(l_.m, l_.chunk));
    const at::Tensor partial = at::empty({rows, l_.P}, sums_);
    group<T>(l_, p_, true, nullptr, nullptr, 0);
    make_u(l_.m);
    for_chunks(l_.m, [&](int64_t first, int64_t count) {
      unit_products_up<T>(l_, data(u_), p_.gamma, first, count);
      transform_groups(l_, data(u_), count);
      collect(l_, grad.const_data_ptr<T>() + first * l_.M, data(u_), table(), partial.mutable_data_ptr<Acc>(), rows,
              first == 0, count);
      transform_groups(l_, data(u_), count);
      unit_gradients<T>(l_, dgamma.mutable_data_ptr<T>(), data(u_), first, count);
    });
    finish_gradients<Acc>(l_, nullptr, nullptr, false, dlambda.mutable_data_ptr<Acc>(), partial.const_data_ptr<Acc>(),
                          rows, p_.scale);
    return {dlambda, dgamma};
  }

 private:
  bool few(int64_t tokens) const { return tokens <= std::min(kFewTokens, l_.chunk) && R_ <= kFewGroups; }

  T* data(const at::Tensor& t) const { return t.mutable_data_ptr<T>(); }
  const Acc* table() const { return table_.const_data_ptr<Acc>(); }

  void make_u(int64_t tokens) { u_ = at::empty({std::min(tokens, l_.chunk), R_, l_.n_padded}, options_); }

  void make_products(int64_t tokens) {
    x_ = at::empty({std::min(tokens, l_.chunk), R_, l_.K}, options_);
    grouped_gamma_ = at::empty({R_, l_.n_padded, l_.K}, options_);
    p_.grouped = data(grouped_gamma_);
  }

  template <class Function>
  void for_chunks(int64_t tokens, const Function& function) const {
    for (int64_t first = 0; first < tokens; first += l_.chunk) function(first, std::min(l_.chunk, tokens - first));
  }

  // out = a @ b; a result of sums is not rounded to 16 bits.
  static void product(at::Tensor out, const at::Tensor& a, const at::Tensor& b) {
    if (out.scalar_type() == a.scalar_type())
      at::bmm_out(out, a, b);
    else if (a.is_cuda())
      at::bmm_out(out, a, b, out.scalar_type());
    else
      at::bmm_out(out, a.to(out.scalar_type()), b.to(out.scalar_type()));
  }

  // u of a chunk, and with the first one what is made of the parameters.
  void hidden(const at::Tensor& narrow, int64_t first, int64_t count) {
    group(l_, p_, first == 0, narrow.const_data_ptr<T>() + first * l_.m, data(x_), count);
    product(u_.narrow(0, 0, count).transpose(0, 1), x_.narrow(0, 0, count).transpose(0, 1),
            grouped_gamma_.transpose(1, 2));
    transform_groups(l_, data(u_), count);
  }

  // out [count, m] += du gamma; overwrites x.
  void add_down(T* out, int64_t count) {
    product(x_.narrow(0, 0, count).transpose(0, 1), u_.narrow(0, 0, count).transpose(0, 1), grouped_gamma_);
    ungroup(l_, out, data(x_), count);
  }

  HadamardLayout l_;
  at::TensorOptions options_, sums_;
  at::Tensor lambda_, gamma_, table_;
  int64_t R_;
  HadamardParameters<T> p_;
  at::Tensor x_, u_, grouped_gamma_;  // [chunk, R, K], [chunk, R, n_padded], [R, n_padded, K]
};

void up(const at::Tensor& out, const at::Tensor& x, at::TensorList pattern, const at::Tensor& lambda,
        const at::Tensor& gamma, double scale) {
  const SkipAutogradAndAutocast plain;
  const HadamardShape s = check_hadamard_tokens(x, out, pattern, lambda, gamma);
  const c10::cuda::CUDAGuard guard(gamma.device());
  if (x.size(0) == 0) return;
  with_float_type(x.scalar_type(), [&](auto t) {
    Call<decltype(t)>(s, lambda, gamma, scale).up(out, x);
  });
}

void down(const at::Tensor& out, const at::Tensor& x, at::TensorList pattern, const at::Tensor& lambda,
          const at::Tensor& gamma, double scale) {
  const SkipAutogradAndAutocast plain;
  const HadamardShape s = check_hadamard_tokens(out, x, pattern, lambda, gamma);
  const c10::cuda::CUDAGuard guard(gamma.device());
  if (x.size(0) == 0) return;
  with_float_type(x.scalar_type(), [&](auto t) {
    Call<decltype(t)>(s, lambda, gamma, scale).down(out, x);
  });
}

Gradients gradients(const at::Tensor& narrow, const at::Tensor& wide, const std::optional<at::Tensor>& into_narrow,
                    const std::optional<at::Tensor>& into_wide, at::TensorList pattern, const at::Tensor& lambda,
                    const at::Tensor& gamma, double scale) {
  const SkipAutogradAndAutocast plain;
  const HadamardShape s = check_hadamard_gradients(narrow, wide, into_narrow, into_wide, pattern, lambda, gamma);
  const c10::cuda::CUDAGuard guard(gamma.device());
  Gradients found;
  with_float_type(narrow.scalar_type(), [&](auto t) {
    found = Call<decltype(t)>(s, lambda, gamma, scale).gradients(narrow, wide, into_narrow, into_wide);
  });
  return found;
}

at::Tensor update(at::TensorList pattern, const at::Tensor& lambda, const at::Tensor& gamma, int64_t max_dim,
                  double scale, const std::optional<at::Tensor>& weight, at::ScalarType dtype) {
  const SkipAutogradAndAutocast plain;
  const HadamardShape s = check_hadamard(pattern, lambda, gamma, max_dim);
  const at::Tensor out = make_hadamard_update(s, weight, gamma, dtype);
  const c10::cuda::CUDAGuard guard(gamma.device());
  with_sum_type(dtype, [&](auto t) {
    Call<decltype(t)>(s, lambda, gamma, scale).update(out, weight);
  });
  return out;
}

Gradients update_backward(const at::Tensor& grad, at::TensorList pattern, const at::Tensor& lambda,
                          const at::Tensor& gamma, double scale, bool need_lambda, bool need_gamma) {
  const SkipAutogradAndAutocast plain;
  const HadamardShape s = check_hadamard_grad(grad, pattern, lambda, gamma);
  const c10::cuda::CUDAGuard guard(gamma.device());
  const at::Tensor rows = grad.contiguous();
  Gradients found;
  with_sum_type(grad.scalar_type(), [&](auto t) {
    found = Call<decltype(t)>(s, lambda, gamma, scale).update_gradients(rows);
  });
  const auto& [dlambda, dgamma] = found;
  return parameter_gradients(dlambda, dgamma, lambda, gamma, need_lambda, need_gamma);
}

}  // namespace

TORCH_LIBRARY_IMPL(randlora, CUDA, m) {
  m.impl("hadamard_up_", &up);
  m.impl("hadamard_down_", &down);
  m.impl("hadamard_gradients", &gradients);
  m.impl("hadamard_update", &update);
  m.impl("hadamard_update_backward", &update_backward);
}

}  // namespace randlora::cuda
