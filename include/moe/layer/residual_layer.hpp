// PR-MoE's layer: a fixed expert that sees every token, and a Mixture-of-Experts layer beside it.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/expert/ffn.hpp>
#include <moe/expert/grouped_gemm.hpp>
#include <moe/expert/segments.hpp>
#include <moe/layer/layer_types.hpp>
#include <moe/layer/moe_layer.hpp>

namespace moe::inline MOE_ABI {

/// How the outputs of the experts and of the fixed one become one.
enum class residual_mix : std::uint8_t {
  add,      ///< out = moe(x) + fixed(x): the paper.
  learned,  ///< out = c0 moe(x) + c1 fixed(x), c = softmax(x W + b), for each token: the released code.
  gated  ///< out = moe(x) + sigmoid(x w) fixed(x): Qwen2's shared expert.
};

/// The parameters of a residual_layer, or their gradients, as views on the caller's memory.
template <class V, class Parameters = ffn_weights<V>, class FixedParameters = Parameters>
struct residual_weights {
  layer_weights<V, Parameters> moe;
  FixedParameters fixed;    ///< P = 1, H of the fixed expert.
  matrix_view<V> mix;       ///< [M,2] if learned, [M,1] if gated, else absent.
  vector_view<V> mix_bias;  ///< [2], empty unless learned.

  template <class U, class Constant, class FixedConstant>
    requires(std::is_same_v<U, V const> && !std::is_const_v<V> &&
             std::is_convertible_v<Parameters, Constant> &&
             std::is_convertible_v<FixedParameters, FixedConstant>)
  constexpr operator residual_weights<U, Constant, FixedConstant>() const noexcept {
    return {moe, fixed, mix, mix_bias};
  }
};

/// Calls f(name, value, gradient) for every parameter; see the one of layer_weights.
template <class V, class Parameters, class FixedParameters, class F>
void for_each_parameter(residual_weights<V, Parameters, FixedParameters> const& values,
                        residual_weights<V, Parameters, FixedParameters> const& gradients, F&& f,
                        call_site site = call_site::here()) {
  for_each_parameter(values.moe, gradients.moe, f, site);
  for_each_parameter(values.fixed, gradients.fixed, f, site);
  expects(values.mix.rows() == gradients.mix.rows() && values.mix.cols() == gradients.mix.cols() &&
              values.mix_bias.size() == gradients.mix_bias.size(),
          "for_each_parameter: values and gradients have the same mix", site);
  if (values.mix.absent()) return;
  detail::visit_part("mix", stacked_view<V>(values.mix), stacked_view<V>(gradients.mix), f);
  if (!values.mix_bias.empty()) f("mix_bias", values.mix_bias, gradients.mix_bias);
}

/// What a residual layer keeps from forward to backward.
template <class V>
struct residual_saved {
  layer_saved<V> moe;
  memory fixed;                 ///< What the fixed expert keeps.
  matrix_view<V> moe_out;       ///< [T,M] if learned or gated
  matrix_view<V> fixed_out;     ///< [T,M] if learned or gated
  matrix_view<V> coefficients;  ///< [T,2] if learned or gated
};

/// A moe_layer and a fixed expert of the same input; owns the mix alone.
///
/// The fixed expert has the activation and the providers of the routed ones, unless others are given, and
/// a hidden width of its own. Masked tokens get the fixed expert's output, too. Where the routed experts
/// are on other ranks, the fixed one is on each:
///
///     moe::residual_layer layer(preset, moe::parallel_experts(ffn, exchange, bounds), ffn, shape)
///
/// Source: Rajbhandari et al., "DeepSpeed-MoE", 2022, section 4.1. The shared experts of Qwen2 (gated),
/// of DeepSeek and of Llama 4 (added; several are one of a larger fixed_hidden) are the same.
/// @tparam Experts  Any model of `experts`. @tparam Fixed  Any model of `row_experts`.
template <class Preset, class Experts, class Fixed = Experts>
class residual_layer {
 public:
  /// Its parameters, or their gradients.
  template <class V>
  using weights = residual_weights<V, typename Experts::template parameters<V>,
                                   typename Fixed::template parameters<V>>;

  /// @param fixed_hidden  H of the fixed expert; 0 = that of the routed ones.
  /// @throws precondition_error as moe_layer does, or if fixed_hidden < 0.
  residual_layer(Preset const& router, Experts const& experts, Fixed const& fixed,
                 layer_shape const& shape, residual_mix mix = residual_mix::add,
                 std::int64_t fixed_hidden = 0, call_site site = call_site::here())
      : moe_(router, experts, shape, site),
        fixed_(fixed),
        mix_(mix),
        fixed_hidden_(fixed_hidden == 0 ? shape.H : fixed_hidden) {
    expects(fixed_hidden >= 0, "residual_layer: fixed_hidden >= 0", site,
            {{"fixed_hidden", fixed_hidden}});
  }
  /// The fixed expert is like the routed ones.
  residual_layer(Preset const& router, Experts const& experts, layer_shape const& shape,
                 residual_mix mix = residual_mix::add, std::int64_t fixed_hidden = 0,
                 call_site site = call_site::here())
    requires std::same_as<Experts, Fixed>
      : residual_layer(router, experts, experts, shape, mix, fixed_hidden, site) {}

  moe_layer<Preset, Experts> const& moe() const noexcept { return moe_; }
  layer_shape const& shape() const noexcept { return moe_.shape(); }
  residual_mix mix() const noexcept { return mix_; }

  std::int64_t parameter_elements() const noexcept {
    return moe_.parameter_elements() + fixed_.parameter_elements(fixed_shape(), shape().bias) +
           shape().M * mix_cols() + mix_biases();
  }
  /// In one array: the parameters of the moe_layer, of the fixed expert, and of the mix.
  template <class V>
  weights<V> carve(V* data) const noexcept {
    weights<V> parts;
    parts.moe = moe_.carve(data);
    data += moe_.parameter_elements();
    parts.fixed = fixed_.carve(data, fixed_shape(), shape().bias);
    data += fixed_.parameter_elements(fixed_shape(), shape().bias);
    if (mixes()) parts.mix = {data, shape().M, mix_cols()};
    if (mix_biases() > 0) parts.mix_bias = {data + shape().M * mix_cols(), mix_biases()};
    return parts;
  }

  template <class V>
  std::size_t saved_bytes() const noexcept {
    memory_size size;
    if (mixes()) {
      for (int i = 0; i < 2; ++i) size.add<V>(shape().T * shape().M);
      size.add<V>(2 * shape().T);
    }
    size.add<std::byte>(static_cast<std::int64_t>(moe_.template saved_bytes<V>()));
    return size.bytes() + fixed_.template saved_bytes<V>(fixed_shape(), shape().T);
  }
  template <class V>
  residual_saved<V> carve_saved(memory from, call_site site = call_site::here()) const {
    char const* const enough = "residual_layer::carve_saved: memory holds saved_bytes()";
    residual_saved<V> saved;
    if (mixes()) {
      std::int64_t const T = shape().T, M = shape().M;
      saved.moe_out = {from.take<V>(T * M, enough, site), T, M};
      saved.fixed_out = {from.take<V>(T * M, enough, site), T, M};
      saved.coefficients = {from.take<V>(2 * T, enough, site), T, 2};
    }
    auto const bytes = static_cast<std::int64_t>(moe_.template saved_bytes<V>());
    saved.moe = moe_.template carve_saved<V>(
        {from.take<std::byte>(bytes, enough, site), static_cast<std::size_t>(bytes)}, site);
    expects(from.size() >= fixed_.template saved_bytes<V>(fixed_shape(), shape().T), enough, site,
            {{"bytes left", from.size()}});
    saved.fixed = from;
    return saved;
  }
  template <class V>
  std::size_t scratch_bytes(cpu const& exec) const noexcept {
    std::int64_t const T = shape().T, M = shape().M;
    std::size_t const fixed =
        std::max(fixed_.template forward_scratch_bytes<V>(exec, fixed_shape(), T),
                 fixed_.template backward_scratch_bytes<V>(exec, fixed_shape(), T));
    memory_size size;
    for (int i = 0; i < 3; ++i) size.add<V>(T * M);
    size.add<V>(2 * T);
    return size.bytes() + std::max({fixed, moe_.template scratch_bytes<V>(exec),
                                    builtin_gemm::scratch_bytes<V>(exec, 1)});
  }

  /// As moe_layer::forward.
  template <class V, class Hooks = no_hooks>
  layer_losses forward(cpu const& exec, std::type_identity_t<weights<V const>> const& parameters,
                       std::type_identity_t<matrix_view<V const>> tokens, batch const& ids,
                       std::type_identity_t<matrix_view<V>> out, residual_saved<V>& saved,
                       memory scratch, Hooks&& hooks = {},
                       call_site site = call_site::here()) const {
    static_assert(row_experts<Fixed, V>);
    std::int64_t const T = tokens.rows(), M = shape().M;
    expects(T <= shape().T && out.rows() == T && out.cols() == M,
            "residual_layer: T is within the bound, out is [T,M]", site,
            {{"T", T}, {"most", shape().T}, {"out.rows", out.rows()}, {"out.cols", out.cols()}});
    expects(!overlap(tokens, out), "residual_layer: the output does not overlap tokens", site);
    expect_arguments(parameters, saved, site);
    matrix_view<V> const moe_out = mixes() ? matrix_view<V>(saved.moe_out.data(), T, M) : out;
    layer_losses const losses =
        moe_.forward(exec, parameters.moe, tokens, ids, moe_out, saved.moe, scratch, hooks, site);
    saved.moe.filled = false;  // until the fixed expert has run, too

    matrix_view<V> const fixed_out = mixes() ? matrix_view<V>(saved.fixed_out.data(), T, M)
                                             : matrix_view<V>(take<V>(scratch, T * M, site), T, M);
    fixed_.forward_rows(exec, fixed_.prepare(parameters.fixed, site), tokens, all_rows(T, site),
                        fixed_out, saved.fixed, scratch, site);
    matrix_view<V> const c(saved.coefficients.data(), T, 2);
    if (mixes()) project_mix(exec, parameters, tokens, c, scratch, site);
    each_token(exec, T, [&](std::int64_t t) {
      V const of_moe = mixes() ? c(t, 0) : V(1), of_fixed = mixes() ? c(t, 1) : V(1);
      for (std::int64_t m = 0; m < M; ++m)
        out(t, m) = of_moe * moe_out(t, m) + of_fixed * fixed_out(t, m);
    });
    saved.moe.filled = true;
    return losses;
  }

  /// As moe_layer::backward.
  template <class V>
  void backward(cpu const& exec, std::type_identity_t<weights<V const>> const& parameters,
                std::type_identity_t<matrix_view<V const>> tokens,
                std::type_identity_t<matrix_view<V const>> dout, loss_weights const& losses,
                residual_saved<V> const& saved, std::type_identity_t<matrix_view<V>> dtokens,
                std::type_identity_t<weights<V>> const& gradients, update how, memory scratch,
                call_site site = call_site::here()) const {
    std::int64_t const T = tokens.rows(), M = shape().M;
    expects(saved.moe.filled && saved.moe.routed.T == T && dout.rows() == T && dout.cols() == M,
            "residual_layer::backward: saved was filled by a forward of the same T, dout is [T,M]",
            site,
            {{"filled", saved.moe.filled},
             {"saved T", saved.moe.routed.T},
             {"T", T},
             {"dout.rows", dout.rows()},
             {"dout.cols", dout.cols()}});
    expect_arguments(parameters, saved, site);
    if (mixes()) check_mix(gradients.mix, gradients.mix_bias, site);
    matrix_view<V const> dmoe = dout, dfixed = dout;
    matrix_view<V> dc;
    if (mixes()) {
      matrix_view<V> const scaled0(take<V>(scratch, T * M, site), T, M);
      matrix_view<V> const scaled1(take<V>(scratch, T * M, site), T, M);
      dc = {take<V>(scratch, 2 * T, site), T, 2};
      unmix(exec, saved, dout, scaled0, scaled1, dc);
      dmoe = scaled0;
      dfixed = scaled1;
    }
    moe_.backward(exec, parameters.moe, tokens, dmoe, losses, saved.moe, dtokens, gradients.moe,
                  how, scratch, site);

    all_rows const all(T, site);
    matrix_view<V> const dinput(take<V>(scratch, T * M, site), T, M);
    fixed_.backward_rows(exec, fixed_.prepare(parameters.fixed, site), dfixed, {}, tokens, all,
                         saved.fixed, dinput, {}, gradients.fixed, how, scratch, site);
    if (mixes()) {
      builtin_gemm::weight_gradient<V>(exec, tokens, mixed(dc), all, how,
                                       stacked_view(gradients.mix), scratch, site);
      builtin_gemm::input_gradient<V>(exec, mixed(dc), stacked_view(parameters.mix), all,
                                      update::add, dinput, scratch, site);
      for (std::int64_t i = 0; i < mix_biases(); ++i) {
        double sum = 0;
        for (std::int64_t t = 0; t < T; ++t) sum += static_cast<double>(dc(t, i));
        gradients.mix_bias[i] =
            static_cast<V>(sum) + (how == update::add ? gradients.mix_bias[i] : V(0));
      }
    }
    each_token(exec, T, [&](std::int64_t t) {
      for (std::int64_t m = 0; m < M; ++m) dtokens(t, m) += dinput(t, m);
    });
  }

 private:
  bool mixes() const noexcept { return mix_ != residual_mix::add; }
  std::int64_t mix_cols() const noexcept {
    return mix_ == residual_mix::add ? 0 : mix_ == residual_mix::learned ? 2 : 1;
  }
  std::int64_t mix_biases() const noexcept { return mix_ == residual_mix::learned ? 2 : 0; }
  /// The columns of c or dc that the matrix of the mix makes: both, or the last.
  template <class V>
  matrix_view<V> mixed(matrix_view<V> c) const noexcept {
    return {c.data() + (2 - mix_cols()), c.rows(), mix_cols(), 2};
  }
  ffn_shape fixed_shape() const noexcept { return {1, shape().M, fixed_hidden_}; }

  template <class V>
  void expect_arguments(weights<V const> const& parameters, residual_saved<V> const& saved,
                        call_site site) const {
    expects((saved.coefficients.cols() == 2) == mixes(),
            "residual_layer: saved was made for this layer", site,
            {{"mixes", mixes()}, {"saved has a mix", saved.coefficients.cols() == 2}});
    if (mixes()) check_mix(parameters.mix, parameters.mix_bias, site);
  }
  template <class V>
  void check_mix(matrix_view<V> mix, vector_view<V> bias, call_site site) const {
    expects(
        mix.rows() == shape().M && mix.cols() == mix_cols() && bias.size() == mix_biases(),
        "residual_layer: a learned mix has weights [M,2] and a bias [2], a gated one weights [M,1]",
        site,
        {{"rows", mix.rows()}, {"cols", mix.cols()}, {"bias", bias.size()}, {"M", shape().M}});
  }

  template <class V>
  static V* take(memory& scratch, std::int64_t count, call_site site) {
    return scratch.take<V>(count, "residual_layer: scratch holds scratch_bytes<V>(exec)", site);
  }
  template <class F>
  static void each_token(cpu const& exec, std::int64_t T, F const& f) {
    exec.split(T, 64, [&](std::int64_t first, std::int64_t last, int) {
      for (std::int64_t t = first; t < last; ++t) f(t);
    });
  }

  /// c = softmax(x W + b), or {1, sigmoid(x w)}, for each token.
  template <class V>
  void project_mix(cpu const& exec, weights<V const> const& parameters, matrix_view<V const> tokens,
                   matrix_view<V> c, memory scratch, call_site site) const {
    bool const biased = mix_biases() > 0;
    builtin_gemm::forward<V>(
        exec, tokens, stacked_view(parameters.mix),
        biased ? matrix_view<V const>(parameters.mix_bias.data(), 1, 2) : matrix_view<V const>(),
        all_rows(tokens.rows(), site), mixed(c), scratch, site);
    each_token(exec, tokens.rows(), [&](std::int64_t t) {
      if (mix_ == residual_mix::gated) {
        c(t, 0) = 1;
        c(t, 1) = V(1) / (V(1) + moe::exp(-c(t, 1)));
        return;
      }
      V const share = V(1) / (V(1) + moe::exp(c(t, 1) - c(t, 0)));
      c(t, 0) = share;
      c(t, 1) = V(1) - share;
    });
  }

  /// From dout to what reaches the experts, the fixed expert and the mix's logits.
  template <class V>
  void unmix(cpu const& exec, residual_saved<V> const& saved, matrix_view<V const> dout,
             matrix_view<V> dmoe, matrix_view<V> dfixed, matrix_view<V> dc) const {
    bool const gated = mix_ == residual_mix::gated;
    each_token(exec, dout.rows(), [&](std::int64_t t) {
      V const c0 = saved.coefficients(t, 0), c1 = saved.coefficients(t, 1);
      V const *const a = saved.moe_out.row(t), *const b = saved.fixed_out.row(t);
      V difference = 0;  // d(loss) / d(c0) - d(loss) / d(c1)
      for (std::int64_t m = 0; m < shape().M; ++m) {
        dmoe(t, m) = c0 * dout(t, m);
        dfixed(t, m) = c1 * dout(t, m);
        difference += dout(t, m) * ((gated ? V(0) : a[m]) - b[m]);
      }
      dc(t, 0) = gated ? V(0) : c0 * c1 * difference;
      dc(t, 1) = (gated ? V(1) - c1 : c0) * c1 * -difference;
    });
  }

  moe_layer<Preset, Experts> moe_;
  Fixed fixed_;
  residual_mix mix_;
  std::int64_t fixed_hidden_;
};

}  // namespace moe::inline MOE_ABI
