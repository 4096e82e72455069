// The seam: experts with nothing beyond the concept are a layer's experts, and one near miss for each
// requirement.
// SPDX-License-Identifier: MIT
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <string>
#include <vector>

#include <moe/layer/moe_layer.hpp>
#include <moe/layer/residual_layer.hpp>

#include "case.hpp"
#include "support/refusal.hpp"

namespace seam {

/// The parameters of `scaling`: not those of an ffn.
template <class V>
struct factors {
  V* of_expert = nullptr;
  std::int64_t count = 0;

  operator factors<V const>() const
    requires(!std::is_const_v<V>)
  {
    return {of_expert, count};
  }
};

/// Expert e multiplies its tokens by one number.
struct without_parameters {
  template <class V>
  struct handle {
    factors<V const> values;
  };

  without_parameters() = delete;
  explicit without_parameters(int) {}

  std::int64_t parameter_elements(moe::ffn_shape const& shape, bool) const { return shape.P; }
  template <class V>
  factors<V> carve(V* data, moe::ffn_shape const& shape, bool) const {
    return {data, shape.P};
  }
  template <class V>
  handle<V> prepare(factors<V const> const& values, moe::call_site) const {
    return {values};
  }
  template <class V>
  std::size_t saved_bytes(moe::ffn_shape const&, std::int64_t) const {
    return 64 + sizeof(V);
  }
  template <class V>
  std::size_t forward_scratch_bytes(moe::cpu const&, moe::ffn_shape const&, std::int64_t) const {
    return 0;
  }
  template <class V>
  std::size_t backward_scratch_bytes(moe::cpu const&, moe::ffn_shape const&, std::int64_t) const {
    return 0;
  }

  template <class V>
  void forward(moe::cpu const&, handle<V> const& h, moe::matrix_view<V const> tokens,
               moe::routing_table const& table, moe::vector_view<V const> weight,
               moe::matrix_view<V> out, moe::memory saved, moe::memory, moe::call_site site) const {
    *saved.take<V>(1, "scaling", site) = V(17);
    for (std::int64_t t = 0; t < table.T; ++t)
      for (std::int64_t m = 0; m < out.cols(); ++m) out(t, m) = 0;
    each_pair(table, [&](std::int64_t t, std::int64_t i, int e) {
      for (std::int64_t m = 0; m < out.cols(); ++m)
        out(t, m) += weight[i] * h.values.of_expert[e] * tokens(t, m);
    });
  }
  template <class V>
  void backward(moe::cpu const&, handle<V> const& h, moe::matrix_view<V const> dout,
                moe::matrix_view<V const> tokens, moe::routing_table const& table,
                moe::vector_view<V const> weight, moe::memory saved, moe::matrix_view<V> dtokens,
                moe::vector_view<V> dweight, factors<V> const& gradients, moe::update how,
                moe::memory, moe::call_site site) const {
    CHECK(*saved.take<V>(1, "scaling", site) == V(17));
    if (how == moe::update::assign)
      for (std::int64_t e = 0; e < gradients.count; ++e) gradients.of_expert[e] = 0;
    for (std::int64_t t = 0; t < table.T; ++t)
      for (std::int64_t m = 0; m < dtokens.cols(); ++m) dtokens(t, m) = 0;
    for (std::int64_t i = 0; i < table.pairs(); ++i) dweight[i] = 0;
    each_pair(table, [&](std::int64_t t, std::int64_t i, int e) {
      V const s = h.values.of_expert[e];
      for (std::int64_t m = 0; m < dtokens.cols(); ++m) {
        dtokens(t, m) += weight[i] * s * dout(t, m);
        dweight[i] += s * tokens(t, m) * dout(t, m);
        gradients.of_expert[e] += weight[i] * tokens(t, m) * dout(t, m);
      }
    });
  }

 private:
  template <class F>
  static void each_pair(moe::routing_table const& table, F const& f) {
    for (std::int64_t t = 0; t < table.T; ++t)
      for (std::int64_t i = table.first_pair(t); i < table.first_pair(t + 1); ++i) {
        if (table.row_of[i] < 0) continue;
        int e = 0;
        while (table.row_of[i] >= table.begin[e] + table.used[e]) ++e;
        f(t, i, e);
      }
  }
};

struct scaling : without_parameters {
  using without_parameters::without_parameters;
  template <class V>
  using parameters = factors<V>;
};

/// Found beside the type of the parameters.
template <class V, class F>
void for_each_parameter(factors<V> const& values, factors<V> const& gradients, F&& f,
                        moe::call_site) {
  f("factors", moe::vector_view<V>(values.of_expert, values.count),
    moe::vector_view<V>(gradients.of_expert, gradients.count));
}

// Near misses -------------------------------------------------------------------------------------

struct not_copyable : scaling {
  not_copyable(not_copyable const&) = delete;
};
template <class V>
struct unconvertible_factors {};
struct of_unconvertible_parameters : scaling {
  template <class V>
  using parameters = unconvertible_factors<V>;
  template <class V>
  unconvertible_factors<V> carve(V*, moe::ffn_shape const&, bool) const;
  template <class V>
  handle<V> prepare(unconvertible_factors<V const> const&, moe::call_site) const;
  template <class V, class... Args>
  void backward(moe::cpu const&, handle<V> const&, Args const&...) const;
};
struct of_convertible_parameters : of_unconvertible_parameters {
  template <class V>
  struct parameters : factors<V> {
    operator parameters<V const>() const;
  };
  template <class V>
  parameters<V> carve(V*, moe::ffn_shape const&, bool) const;
  template <class V>
  handle<V> prepare(factors<V const> const&, moe::call_site) const;
};
struct without_elements : scaling {
  void parameter_elements() const;
};
struct of_int_elements : scaling {
  int parameter_elements(moe::ffn_shape const&, bool) const;
};
struct without_carve : scaling {
  void carve() const;
};
struct that_carve_constants : scaling {
  template <class V>
  factors<V const> carve(V*, moe::ffn_shape const&, bool) const;
};
struct without_prepare : scaling {
  void prepare() const;
};
struct that_prepare_without_site : scaling {
  template <class V>
  handle<V> prepare(factors<V const> const&) const;
};
struct that_change : scaling {
  template <class V>
  handle<V> prepare(factors<V const> const&, moe::call_site);
};
struct without_forward : scaling {
  void forward() const;
};
struct without_backward : scaling {
  void backward() const;
};
struct without_saved_bytes : scaling {
  void saved_bytes() const;
};
struct of_int_saved_bytes : scaling {
  template <class V>
  int saved_bytes(moe::ffn_shape const&, std::int64_t) const;
};
struct without_forward_scratch : scaling {
  void forward_scratch_bytes() const;
};
struct without_backward_scratch : scaling {
  void backward_scratch_bytes() const;
};
static_assert(moe::experts<scaling, float> && moe::experts<scaling, double>);
static_assert(moe::experts<of_convertible_parameters, float>);
static_assert(!moe::experts<not_copyable, float>);
static_assert(!moe::experts<without_parameters, float>);
static_assert(!moe::experts<of_unconvertible_parameters, float>);
static_assert(!moe::experts<without_elements, float>);
static_assert(!moe::experts<of_int_elements, float>);
static_assert(!moe::experts<without_carve, float>);
static_assert(!moe::experts<that_carve_constants, float>);
static_assert(!moe::experts<without_prepare, float>);
static_assert(!moe::experts<that_prepare_without_site, float>);
static_assert(!moe::experts<that_change, float>);
static_assert(!moe::experts<without_forward, float>);
static_assert(!moe::experts<without_backward, float>);
static_assert(!moe::experts<without_saved_bytes, float>);
static_assert(!moe::experts<of_int_saved_bytes, float>);
static_assert(!moe::experts<without_forward_scratch, float>);
static_assert(!moe::experts<without_backward_scratch, float>);

// row_experts -------------------------------------------------------------------------------------

/// The same, by rows as well.
struct scaling_rows : scaling {
  using scaling::scaling;
  template <class V>
  void forward_rows(moe::cpu const&, handle<V> const& h, moe::matrix_view<V const> rows,
                    moe::row_segments const& segments, moe::matrix_view<V> out, moe::memory,
                    moe::memory, moe::call_site) const {
    each_row(segments, [&](int e, std::int64_t r) {
      for (std::int64_t m = 0; m < out.cols(); ++m) out(r, m) = h.values.of_expert[e] * rows(r, m);
    });
  }
  template <class V>
  void backward_rows(moe::cpu const&, handle<V> const& h, moe::matrix_view<V const> dout,
                     moe::vector_view<V const> row_weight, moe::matrix_view<V const> rows,
                     moe::row_segments const& segments, moe::memory, moe::matrix_view<V> drows,
                     moe::vector_view<V> drow_weight, factors<V> const& gradients, moe::update how,
                     moe::memory, moe::call_site) const {
    CHECK(row_weight.empty());
    CHECK(drow_weight.empty());
    if (how == moe::update::assign)
      for (std::int64_t e = 0; e < gradients.count; ++e) gradients.of_expert[e] = 0;
    each_row(segments, [&](int e, std::int64_t r) {
      for (std::int64_t m = 0; m < drows.cols(); ++m) {
        drows(r, m) = h.values.of_expert[e] * dout(r, m);
        gradients.of_expert[e] += rows(r, m) * dout(r, m);
      }
    });
  }

 private:
  template <class F>
  static void each_row(moe::row_segments const& segments, F const& f) {
    for (int e = 0; e < segments.experts; ++e)
      for (std::int32_t r = 0; r < segments.used[e]; ++r) f(e, segments.begin[e] + r);
  }
};
struct without_forward_rows : scaling_rows {
  void forward_rows() const;
};
struct without_backward_rows : scaling_rows {
  void backward_rows() const;
};
static_assert(moe::row_experts<scaling_rows, float> && moe::row_experts<scaling_rows, double>);
static_assert(!moe::row_experts<scaling, float>);
static_assert(!moe::row_experts<without_forward_rows, float>);
static_assert(!moe::row_experts<without_backward_rows, float>);

}  // namespace seam

namespace {

using moe_test::owned_layer;
using moe_test::small;

/// Checks the gradients of a layer, and that an optimiser reaches every parameter.
template <class Layer>
void check_layer(Layer const& layer) {
  owned_layer<double, Layer> c(layer, small.T, 5);
  auto const result = moe_test::check_gradients(c);
  CHECK(result.flipped == 0);
  CHECK(result.worst < 2e-8);
  CHECK(2 * result.nonzero > result.checked);
  auto const once = c.gradients;
  c.forward();
  c.backward({.balance = 0.3, .z = 0.2}, moe::update::add);
  for (std::size_t i = 0; i < once.size(); ++i)
    CHECK(c.gradients[i] == doctest::Approx(2 * once[i]).epsilon(1e-12));
  std::int64_t elements = 0;
  moe::for_each_parameter(c.weights(), c.dweights(),
                          [&](char const*, auto value, auto) { elements += value.size(); });
  CHECK(elements == layer.parameter_elements());
}

}  // namespace

TEST_CASE("layer: experts with nothing beyond the concept are the experts of a moe_layer") {
  check_layer(moe::moe_layer(moe::deepspeed_top2({.capacity_factor = 0.7, .min_capacity = 1}),
                             seam::scaling(0), small));
}

TEST_CASE("layer: row_experts with nothing beyond the concept have hooks and a residual_layer") {
  for (auto const mix : {moe::residual_mix::add, moe::residual_mix::learned})
    check_layer(moe::residual_layer(moe::tutel_topk({.k = 2}), seam::scaling_rows(0), small, mix));

  struct counting {
    std::int64_t in = 0, out = 0;
    void rows_in(moe::matrix_view<double const> rows) { in += rows.rows(); }
    void rows_out(moe::matrix_view<double const> rows) { out += rows.rows(); }
  } hooks;
  moe::moe_layer const layer(moe::tutel_topk({.k = 2, .capacity_factor = 0}), seam::scaling_rows(0),
                             small);
  owned_layer<double, std::remove_cv_t<decltype(layer)>> c(layer, small.T, 5);
  c.forward(hooks);
  CHECK(hooks.in == 2 * small.T);
  CHECK(hooks.out == 2 * small.T);
}

TEST_CASE("layer: experts that do not say weights_before weigh what comes out") {
  auto const make = [](bool before) {
    return moe_test::refusal([&] {
      moe::moe_layer(moe::tutel_topk({.k = 2, .is_postscore = !before}), seam::scaling(0), small);
    });
  };
  moe_test::says(make(false), "nothing was thrown");
  moe_test::says(make(true), "moe_layer: preset and experts agree on where weights apply");
}
