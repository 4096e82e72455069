// The place of the feed-forward part in a transformer block: everything in it is the library's.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include <moe/moe.hpp>

namespace pr_moe_text {

/// What one forward of a feed-forward part reports.
struct ffn_report {
  double balance = 0;              // load-balancing loss, 0 for a dense part
  std::int64_t pairs = 0;          // (token, expert) pairs that were asked for
  std::int64_t dropped = 0;        // of these, over capacity
  std::vector<std::int64_t> load;  // rows of each expert, kept
};

/// What a block of the transformer needs of its feed-forward part. The model calls it once per layer
/// and step, so a virtual call costs nothing.
template <class V>
class ffn_slot {
 public:
  virtual ~ffn_slot() = default;
  virtual std::int64_t parameter_elements() const = 0;
  /// Parameters and gradients of this slot in the model's arrays; fills the first with first values.
  virtual void bind(moe::cpu const& exec, V* values, V* gradients, std::uint64_t seed,
                    int layer) = 0;
  virtual ffn_report forward(moe::cpu const& exec, moe::matrix_view<V const> x,
                             moe::batch const& ids, moe::matrix_view<V> out) = 0;
  /// dx = the gradient of x; those of the parameters are assigned.
  virtual void backward(moe::cpu const& exec, moe::matrix_view<V const> x,
                        moe::matrix_view<V const> dout, double balance_weight,
                        moe::matrix_view<V> dx) = 0;
  /// Experts that a token may choose from; 1 for a dense part.
  virtual int experts() const { return 1; }
};

inline moe::initialisation first_values(std::uint64_t seed, int layer, int part) {
  return {.rule = moe::initialisation::law::scaled_uniform,
          .seed = seed,
          .layer = static_cast<std::uint32_t>(2 * layer + part)};
}

/// One expert for every token: a dense FFN.
template <class V>
class dense_slot final : public ffn_slot<V> {
 public:
  dense_slot(moe::cpu const& exec, std::int64_t most_tokens, moe::ffn_shape const& shape)
      : shape_(shape),
        saved_(ffn_.template saved_bytes<V>(shape, most_tokens)),
        scratch_(std::max(ffn_.template forward_scratch_bytes<V>(exec, shape, most_tokens),
                          ffn_.template backward_scratch_bytes<V>(exec, shape, most_tokens))) {}

  std::int64_t parameter_elements() const override {
    return moe::ffn_elements(shape_, false, true);
  }
  void bind(moe::cpu const& exec, V* values, V* gradients, std::uint64_t seed, int layer) override {
    values_ = moe::carve_ffn(values, shape_, false, true);
    gradients_ = moe::carve_ffn(gradients, shape_, false, true);
    moe::initialise(exec, values_, first_values(seed, layer, 0));
  }
  ffn_report forward(moe::cpu const& exec, moe::matrix_view<V const> x, moe::batch const&,
                     moe::matrix_view<V> out) override {
    ffn_.template forward_rows<V>(exec, ffn_.prepare(values_), x, moe::all_rows(x.rows()), out,
                                  saved_, scratch_);
    return {};
  }
  void backward(moe::cpu const& exec, moe::matrix_view<V const> x, moe::matrix_view<V const> dout,
                double, moe::matrix_view<V> dx) override {
    ffn_.template backward_rows<V>(exec, ffn_.prepare(values_), dout, {}, x,
                                   moe::all_rows(x.rows()), saved_, dx, {}, gradients_,
                                   moe::update::assign, scratch_);
  }

 private:
  moe::ffn<moe::gelu_tanh> ffn_;
  moe::ffn_shape shape_;
  moe::buffer saved_, scratch_;
  moe::ffn_weights<V> values_, gradients_;
};

/// A moe_layer or a residual_layer.
template <class V, class Layer, class Hooks = moe::no_hooks>
class routed_slot final : public ffn_slot<V> {
 public:
  using weights = decltype(std::declval<Layer const&>().carve(static_cast<V*>(nullptr)));

  /// @param first_expert  Of those whose parameters are held here.
  routed_slot(moe::cpu const& exec, Layer const& layer, Hooks hooks = {}, int first_expert = 0)
      : layer_(layer),
        hooks_(std::move(hooks)),
        first_expert_(first_expert),
        saved_bytes_(layer.template saved_bytes<V>()),
        scratch_(layer.template scratch_bytes<V>(exec)),
        saved_(layer.template carve_saved<V>(saved_bytes_)) {}

  std::int64_t parameter_elements() const override { return layer_.parameter_elements(); }
  void bind(moe::cpu const& exec, V* values, V* gradients, std::uint64_t seed, int layer) override {
    values_ = layer_.carve(values);
    gradients_ = layer_.carve(gradients);
    auto const& routed = of_moe(values_);
    moe::initialisation law = first_values(seed, layer, 0);
    law.first_expert = first_expert_;
    moe::initialise(exec, routed.experts, law);
    for (std::int64_t m = 0; m < routed.router.rows(); ++m)
      for (std::int64_t e = 0; e < routed.router.cols(); ++e)
        routed.router(m, e) = V(
            0.02f * moe::normal({.id = m, .seed = seed, .step = static_cast<std::uint32_t>(layer)},
                                moe::stream::user, static_cast<std::uint32_t>(e)));
    if constexpr (requires { values_.fixed; })
      moe::initialise(exec, values_.fixed, first_values(seed, layer, 1));
    if constexpr (requires { values_.mix; })
      if (!values_.mix.absent()) {
        std::fill_n(values_.mix.data(), values_.mix.span(), V(0));
        std::fill_n(values_.mix_bias.data(), 2, V(0));
      }
  }
  ffn_report forward(moe::cpu const& exec, moe::matrix_view<V const> x, moe::batch const& ids,
                     moe::matrix_view<V> out) override {
    auto const losses = layer_.forward(exec, values_, x, ids, out, saved_, scratch_, hooks_);
    moe::routing_table const& table = of_moe(saved_).table;
    ffn_report report{.balance = losses.balance,
                      .pairs = table.pairs(),
                      .dropped = table.counts->dropped,
                      .load = {}};
    report.load.assign(table.used, table.used + table.P);
    return report;
  }
  void backward(moe::cpu const& exec, moe::matrix_view<V const> x, moe::matrix_view<V const> dout,
                double balance_weight, moe::matrix_view<V> dx) override {
    layer_.backward(exec, values_, x, dout, {.balance = balance_weight}, saved_, dx, gradients_,
                    moe::update::assign, scratch_);
  }
  int experts() const override { return layer_.shape().E; }
  weights const& gradients() const { return gradients_; }

 private:
  /// The part of a residual layer's values that is the moe_layer's.
  template <class Part>
  static auto& of_moe(Part& part) {
    if constexpr (requires { part.moe; })
      return part.moe;
    else
      return part;
  }
  using saved = decltype(std::declval<Layer const&>().template carve_saved<V>(moe::memory{}));

  Layer layer_;
  Hooks hooks_;
  int first_expert_;
  moe::buffer saved_bytes_, scratch_;
  saved saved_;
  weights values_, gradients_;
};

/// The feed-forward part of one layer, as a schedule of experts says.
template <class V>
std::unique_ptr<ffn_slot<V>> make_slot(moe::cpu const& exec, std::int64_t most_tokens,
                                       std::int64_t M, std::int64_t H, int experts, bool residual,
                                       double capacity_factor) {
  if (experts == 0)
    return std::make_unique<dense_slot<V>>(exec, most_tokens, moe::ffn_shape{1, M, H});
  auto const router = moe::deepspeed_top1({.capacity_factor = capacity_factor,
                                           .eval_capacity_factor = 2 * capacity_factor,
                                           .use_rts = true});
  moe::ffn<moe::gelu_tanh> const ffn;
  if (!residual) {
    moe::moe_layer const layer(router, ffn,
                               {.T = most_tokens, .M = M, .H = H, .E = experts, .bias = true});
    return std::make_unique<routed_slot<V, std::decay_t<decltype(layer)>>>(exec, layer);
  }
  // A fixed half beside a routed half: as many active parameters as one dense FFN.
  moe::residual_layer const layer(
      router, ffn, {.T = most_tokens, .M = M, .H = H / 2, .E = experts, .bias = true},
      moe::residual_mix::learned);
  return std::make_unique<routed_slot<V, std::decay_t<decltype(layer)>>>(exec, layer);
}

}  // namespace pr_moe_text
