// Layers with lists (sparse_update.h), and with planes (packed_update.h) on the CPU: dW is built, and its gradient
// taken apart, without S2 and B2. Rows or columns of dW without a non-zero take no part in the products.
//
// With lists, the CPU computes h from what is not zero as well (sparse_products.h). That is their factored strategy,
// and how every strategy gets the gradients of lambda and gamma. Planes have no factored strategy: they are made dense
// for it.
#include <optional>

#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "layer/layer.h"
#include "ops.h"
#include "pattern.h"

namespace randlora {
namespace {

// D is dW^T where in <= out and dW otherwise, [rows, M]: the rows that are not zero.
class TernaryLayer final : public Layer {
 public:
  using Layer::Layer;

 private:
  void add_update(at::Tensor& y, const at::Tensor& x) const override {
    if (strategy_ == Strategy::factored)
      (wide_ ? sparse_up_ : sparse_down_)(zeros_unless_defined(y, out_, x), x.contiguous(), a_.pattern, a_.lambda,
                                          a_.gamma, a_.scale);
    else if (wide_)
      accumulate(y, columns_of(x), rows_of_update());
    else
      add_columns(y, x, rows_of_update().t(), out_);
  }

  ParameterGradients update_backward(at::Tensor& dx, const at::Tensor& g, const at::Tensor& x,
                                     const Needed& needed) const override {
    if (needed.x && strategy_ == Strategy::materialized) {
      if (wide_)
        add_columns(dx, g, rows_of_update().t(), in_);
      else
        accumulate(dx, columns_of(g), rows_of_update());
    }
    if (is_lists(a_.pattern)) return through_tokens(dx, g.contiguous(), x, needed);
    if (!needed.parameters()) return {};
    return sparse_update_backward(update_gradient(g, x), a_.pattern, a_.lambda, a_.gamma, a_.scale, needed.lambda,
                                  needed.gamma);
  }

  at::Tensor matrix(const at::Tensor& weight) const override { return matrix_by(sparse_update, weight); }

  // With products that leave out what is zero, which beat a dense one for the gradient of D.
  ParameterGradients through_tokens(at::Tensor& dx, const at::Tensor& g, const at::Tensor& x,
                                    const Needed& needed) const {
    std::optional<at::Tensor> into;  // both gradients in one go where in <= out, as they have h in common
    if (needed.x && strategy_ == Strategy::factored) {
      zeros_unless_defined(dx, in_, g);
      if (!wide_)
        sparse_up_(dx, g, a_.pattern, a_.lambda, a_.gamma, a_.scale);
      else if (needed.parameters())
        into = dx;
      else
        sparse_down_(dx, g, a_.pattern, a_.lambda, a_.gamma, a_.scale);
    }
    if (!needed.parameters()) return {};
    const at::Tensor others = x.contiguous();
    return sparse_gradients(wide_ ? others : g, wide_ ? g : others, into, a_.pattern, a_.lambda, a_.gamma, a_.scale);
  }

  at::Tensor rows_of_update() const {
    return sparse_update(a_.pattern, a_.lambda, a_.gamma, sizes_.M, a_.scale, std::nullopt, dtype_);
  }

  // Whether D has all m rows.
  bool all_rows() const { return !is_lists(a_.pattern) || ListTensors(a_.pattern).columns.numel() == sizes_.m; }

  // The features of the smaller side that D has rows for.
  at::Tensor columns_of(const at::Tensor& t) const {
    return all_rows() ? t : t.index_select(1, ListTensors(a_.pattern).columns);
  }

  // y[:, columns that D has rows for] += a @ b; y has `width` columns.
  void add_columns(at::Tensor& y, const at::Tensor& a, const at::Tensor& b, int64_t width) const {
    if (all_rows()) return accumulate(y, a, b);
    zeros_unless_defined(y, width, a);
    y.index_add_(1, ListTensors(a_.pattern).columns, at::mm(a, b));
  }
};

}  // namespace

std::unique_ptr<Layer> make_ternary_layer(const LayerArguments& a, Strategy strategy) {
  return std::make_unique<TernaryLayer>(a, strategy);
}

}  // namespace randlora
