// Soft MoE: every slot of an expert is a mean of all tokens, every token a mean of all slots' outputs.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/expert/ffn_weights.hpp>
#include <moe/expert/grouped_gemm.hpp>
#include <moe/expert/segments.hpp>
#include <moe/layer/detail/soft_routing.hpp>

namespace moe::inline MOE_ABI {

/// The bounds of a soft_moe layer, fixed when it is made.
struct soft_moe_shape {
  std::int64_t T = 0;         ///< Most tokens of a call.
  std::int64_t M = 0;         ///< Model width.
  std::int64_t H = 0;         ///< Hidden width of one expert.
  int E = 0;                  ///< Experts.
  int slots = 1;              ///< Of each expert; L = E * slots of them in all, for each sequence.
  std::int64_t sequence = 0;  ///< S: tokens that are mixed with each other; 0 = all of a call.
  bool bias = false;          ///< Whether the projections of the experts have biases.
};

/// The parameters of a soft_moe layer, or their gradients, as views on the caller's memory.
template <class V, class Parameters = ffn_weights<V>>
struct soft_moe_weights {
  matrix_view<V> phi;    ///< [M,L]: a vector for each slot, those of one expert side by side.
  vector_view<V> scale;  ///< [1]
  Parameters experts;

  template <class U, class Constant>
    requires(std::is_same_v<U, V const> && !std::is_const_v<V> &&
             std::is_convertible_v<Parameters, Constant>)
  constexpr operator soft_moe_weights<U, Constant>() const noexcept {
    return {phi, scale, experts};
  }
};

/// Calls f(name, value, gradient) for every parameter; see the one of layer_weights.
template <class V, class Parameters, class F>
void for_each_parameter(soft_moe_weights<V, Parameters> const& values,
                        soft_moe_weights<V, Parameters> const& gradients, F&& f,
                        call_site site = call_site::here()) {
  matrix_view<V> const &v = values.phi, &g = gradients.phi;
  expects(v.rows() == g.rows() && v.cols() == g.cols() && values.scale.size() == 1 &&
              gradients.scale.size() == 1,
          "for_each_parameter: values and gradients have the same phi and one scale", site);
  detail::visit_part("phi", stacked_view<V>(v), stacked_view<V>(g), f);
  f("scale", values.scale, gradients.scale);
  for_each_parameter(values.experts, gradients.experts, f, site);
}

/// What a soft_moe layer keeps from forward to backward.
template <class V>
struct soft_moe_saved {
  matrix_view<V> dispatch;   ///< [T,L]: of each column, one over the tokens of a sequence.
  matrix_view<V> combine;    ///< [T,L]: of each row, one over the slots.
  matrix_view<V> slots_in;   ///< [sequences * L, M]
  matrix_view<V> slots_out;  ///< [sequences * L, M]
  memory experts;            ///< What the experts keep.
  std::int64_t T = -1;       ///< Tokens of the forward that filled it; -1 = none.
};

/// out = C experts(D^T X): the dense counterpart of a routing. For each sequence of S tokens,
///
///     logits = norm(X) (scale norm(phi))              [S,L], norm(v) = v / (|v| + 1e-6)
///     D = softmax of logits over tokens, C = softmax of logits over slots
///     out = C Y, Y[l] = expert(l / slots) of row l of D^T X
///
/// Nothing is dropped, nothing has to be balanced, and everything has a gradient. Not causal: each slot
/// sees all tokens of its sequence. A token of NaN spoils its sequence.
/// @tparam Experts  Any model of `row_experts`.
/// Source: Puigcerver et al., "From sparse to soft mixtures of experts", 2024.
/// Example: two equal tokens x, any phi: D is 1/2 everywhere, each slot is x, and each token's output is
/// the mean of the slots' outputs weighted by C.
template <class Experts>
class soft_moe {
 public:
  /// Its parameters, or their gradients.
  template <class V>
  using weights = soft_moe_weights<V, typename Experts::template parameters<V>>;

  /// @throws precondition_error unless T >= 0, M, H, E, slots >= 1, sequence >= 0, and slots of all
  ///         sequences fit 32-bit ids.
  soft_moe(Experts const& experts, soft_moe_shape const& shape, call_site site = call_site::here())
      : experts_(experts), shape_(shape) {
    expects(shape.T >= 0 && shape.M >= 1 && shape.H >= 1 && shape.E >= 1 && shape.slots >= 1 &&
                shape.sequence >= 0,
            "soft_moe: T >= 0, M >= 1, H >= 1, E >= 1, slots >= 1, sequence >= 0", site,
            {{"T", shape.T},
             {"M", shape.M},
             {"H", shape.H},
             {"E", shape.E},
             {"slots", shape.slots},
             {"sequence", shape.sequence}});
    constexpr std::int64_t most = 0x7fffffff;
    expects(shape.slots <= most / shape.E && shape.T <= most &&
                L() <= most / std::max<std::int64_t>(1, most_sequences()),
            "soft_moe: T and the slots of all sequences fit 32-bit ids", site,
            {{"T", shape.T}, {"L", L()}, {"sequences", most_sequences()}});
  }

  soft_moe_shape const& shape() const noexcept { return shape_; }
  /// Slots of a sequence.
  std::int64_t L() const noexcept { return std::int64_t{shape_.E} * shape_.slots; }

  std::int64_t parameter_elements() const noexcept {
    return shape_.M * L() + 1 + experts_.parameter_elements(expert_shape(), shape_.bias);
  }
  /// In one array: phi, scale, experts.
  template <class V>
  weights<V> carve(V* data) const noexcept {
    std::int64_t const phi = shape_.M * L();
    return {matrix_view<V>(data, shape_.M, L()), vector_view<V>(data + phi, 1),
            experts_.carve(data + phi + 1, expert_shape(), shape_.bias)};
  }

  /// Bytes from forward to backward.
  template <class V>
  std::size_t saved_bytes() const noexcept {
    memory_size size;
    for (int i = 0; i < 2; ++i) size.add<V>(shape_.T * L());
    for (int i = 0; i < 2; ++i) size.add<V>(most_slots() * shape_.M);
    return size.bytes() + experts_.template saved_bytes<V>(expert_shape(), most_slots()) +
           memory::alignment;
  }
  /// @throws precondition_error if `from` has fewer than saved_bytes<V>() bytes.
  template <class V>
  soft_moe_saved<V> carve_saved(memory from, call_site site = call_site::here()) const {
    char const* const enough = "soft_moe::carve_saved: memory holds saved_bytes()";
    auto const take = [&](std::int64_t rows, std::int64_t cols) {
      return matrix_view<V>(from.take<V>(rows * cols, enough, site), rows, cols);
    };
    soft_moe_saved<V> saved;
    saved.dispatch = take(shape_.T, L());
    saved.combine = take(shape_.T, L());
    saved.slots_in = take(most_slots(), shape_.M);
    saved.slots_out = take(most_slots(), shape_.M);
    expects(from.size() >= experts_.template saved_bytes<V>(expert_shape(), most_slots()), enough,
            site, {{"bytes left", from.size()}});
    saved.experts = from;
    return saved;
  }
  /// Bytes for forward and backward; shared by all layers that run one after another.
  template <class V>
  std::size_t scratch_bytes(cpu const& exec) const noexcept {
    std::int64_t const n = most_sequences();
    memory_size size;
    for (int i = 0; i < 2; ++i) size.add<std::int32_t>(n);
    for (int i = 0; i < 2; ++i) size.add<std::int32_t>(std::max<std::int64_t>(n, 1) * shape_.E);
    for (int i = 0; i < 2; ++i) size.add<V>(shape_.T * shape_.M);
    for (int i = 0; i < 2; ++i) size.add<V>(shape_.T * L());
    for (int i = 0; i < 2; ++i) size.add<V>(shape_.M * L());
    for (int i = 0; i < 2; ++i) size.add<V>(L());
    size.add<V>(most_slots() * shape_.M);
    std::size_t const steps = std::max(
        {experts_.template forward_scratch_bytes<V>(exec, expert_shape(), most_slots()),
         experts_.template backward_scratch_bytes<V>(exec, expert_shape(), most_slots()),
         builtin_gemm::scratch_bytes<V>(exec, static_cast<int>(std::max<std::int64_t>(n, 1)))});
    return size.bytes() + steps;
  }

  /// @param tokens   [T,M], T <= shape().T and a multiple of shape().sequence.
  /// @param ids      Of them, the mask is read: a masked token is in no slot, and its output is 0.
  /// @param out      [T,M] out; must not overlap tokens.
  /// @param saved    Made by carve_saved of a layer of this shape; filled.
  /// @param scratch  scratch_bytes<V>(exec).
  /// @throws precondition_error if shapes disagree, T is beyond the bound, or memory is too small.
  /// @note  Allocates nothing. Bitwise the same for any number of threads.
  /// @cost  4 T L M operations for each of two products beside those of the experts on T / S * L rows.
  template <class V>
  void forward(cpu const& exec, std::type_identity_t<weights<V const>> const& parameters,
               std::type_identity_t<matrix_view<V const>> tokens, batch const& ids,
               std::type_identity_t<matrix_view<V>> out, soft_moe_saved<V>& saved, memory scratch,
               call_site site = call_site::here()) const {
    static_assert(row_experts<Experts, V>);
    expect_arguments<V>(parameters, tokens, out, saved, site);
    std::int64_t const T = tokens.rows(), M = shape_.M;
    saved.T = -1;
    slots_of_call const cut(*this, T, scratch, site);
    auto const kept = views_of(saved, cut);
    matrix_view<V> const normal = take<V>(scratch, T, M, site),
                         phi = take<V>(scratch, M, L(), site);
    V* const norms = scratch.take<V>(L(), scratch_rule, site);
    detail::normalise_rows<V>(exec, tokens, normal);
    detail::normalise_columns<V>(parameters.phi, parameters.scale[0], norms, phi);
    builtin_gemm::forward<V>(exec, normal, stacked_view(phi), {}, all_rows(T, site), kept.combine,
                             scratch, site);
    detail::softmax_over_tokens<V>(exec, kept.combine, cut.S, ids, kept.dispatch);
    detail::softmax_over_slots<V>(exec, ids, kept.combine);

    builtin_gemm::weight_gradient<V>(exec, kept.dispatch, tokens, cut.tokens, update::assign,
                                     cut.stack(kept.slots_in), scratch, site);
    experts_.forward_rows(exec, experts_.prepare(parameters.experts, site),
                          matrix_view<V const>(kept.slots_in), cut.slots, kept.slots_out,
                          saved.experts, scratch, site);
    builtin_gemm::forward<V>(exec, kept.combine, cut.stack(kept.slots_out), {}, cut.tokens, out,
                             scratch, site);
    saved.T = T;
  }

  /// The gradient of forward.
  ///
  /// @param parameters, tokens, ids  As forward was given them.
  /// @param dout       [T,M] in.
  /// @param saved      As forward left it; not changed, so that it can be called again.
  /// @param dtokens    [T,M] out; must not overlap tokens or dout.
  /// @param gradients  Of the parameters' shapes; assigned, or added to.
  /// @param scratch    scratch_bytes<V>(exec).
  /// @throws precondition_error if shapes disagree, no forward has filled `saved` with as many tokens, or
  ///         memory is too small.
  /// @note  Allocates nothing. Bitwise the same for any number of threads.
  template <class V>
  void backward(cpu const& exec, std::type_identity_t<weights<V const>> const& parameters,
                std::type_identity_t<matrix_view<V const>> tokens,
                std::type_identity_t<matrix_view<V const>> dout, soft_moe_saved<V> const& saved,
                std::type_identity_t<matrix_view<V>> dtokens,
                std::type_identity_t<weights<V>> const& gradients, update how, memory scratch,
                call_site site = call_site::here()) const {
    expect_arguments<V>(parameters, tokens, dtokens, saved, site);
    std::int64_t const T = tokens.rows(), M = shape_.M;
    expects(saved.T == T, "soft_moe::backward: saved was filled by a forward of the same T", site,
            {{"saved T", saved.T}, {"T", T}});
    expects(dout.rows() == T && dout.cols() == M && !overlap(dout, dtokens),
            "soft_moe::backward: dout is [T,M] and does not overlap dtokens", site,
            {{"rows", dout.rows()}, {"cols", dout.cols()}, {"T", T}, {"M", M}});
    expects(gradients.phi.rows() == M && gradients.phi.cols() == L() && gradients.scale.size() == 1,
            "soft_moe::backward: the gradients of phi and scale are [M,L] and [1]", site,
            {{"rows", gradients.phi.rows()},
             {"cols", gradients.phi.cols()},
             {"scale", gradients.scale.size()}});

    slots_of_call const cut(*this, T, scratch, site);
    auto const kept = views_of(saved, cut);
    all_rows const all(T, site);
    matrix_view<V> const normal = take<V>(scratch, T, M, site),
                         phi = take<V>(scratch, M, L(), site);
    V* const norms = scratch.take<V>(L(), scratch_rule, site);
    V* const dots = scratch.take<V>(L(), scratch_rule, site);
    matrix_view<V> const dslots = take<V>(scratch, cut.rows(), M, site);
    matrix_view<V> const dlogits = take<V>(scratch, T, L(), site);    // of combine first
    matrix_view<V> const ddispatch = take<V>(scratch, T, L(), site);  // [T,L]
    matrix_view<V> const dphi = take<V>(scratch, M, L(), site);
    matrix_view<V> const dnormal = take<V>(scratch, T, M, site);

    builtin_gemm::input_gradient<V>(exec, dout, cut.stack(kept.slots_out), cut.tokens,
                                    update::assign, dlogits, scratch, site);
    builtin_gemm::weight_gradient<V>(exec, kept.combine, dout, cut.tokens, update::assign,
                                     cut.stack(dslots), scratch, site);
    experts_.backward_rows(exec, experts_.prepare(parameters.experts, site),
                           matrix_view<V const>(dslots), vector_view<V const>(),
                           matrix_view<V const>(kept.slots_in), cut.slots, saved.experts, dslots,
                           vector_view<V>(), gradients.experts, how, scratch, site);
    builtin_gemm::input_gradient<V>(exec, tokens, cut.stack(dslots), cut.tokens, update::assign,
                                    ddispatch, scratch, site);
    builtin_gemm::forward<V>(exec, kept.dispatch, cut.stack(dslots), {}, cut.tokens, dtokens,
                             scratch, site);

    detail::softmax_over_slots_backward<V>(exec, kept.combine, dlogits);
    detail::softmax_over_tokens_backward<V>(exec, kept.dispatch, ddispatch, cut.S, dlogits);
    V const scale = parameters.scale[0];
    detail::normalise_rows<V>(exec, tokens, normal);
    detail::normalise_columns<V>(parameters.phi, scale, norms, phi);
    builtin_gemm::weight_gradient<V>(exec, normal, dlogits, all, update::assign, stacked_view(dphi),
                                     scratch, site);
    builtin_gemm::input_gradient<V>(exec, dlogits, stacked_view(phi), all, update::assign, dnormal,
                                    scratch, site);
    detail::normalise_rows_backward<V>(exec, tokens, dnormal, dtokens);
    V const dscale =
        detail::normalise_columns_backward<V>(parameters.phi, scale, norms, dots, dphi);
    bool const add = how == update::add;
    for (std::int64_t m = 0; m < M; ++m)
      for (std::int64_t l = 0; l < L(); ++l)
        gradients.phi(m, l) = dphi(m, l) + (add ? gradients.phi(m, l) : V(0));
    gradients.scale[0] = dscale + (add ? gradients.scale[0] : V(0));
  }

 private:
  static constexpr char const* scratch_rule = "soft_moe: scratch holds scratch_bytes<V>(exec)";

  ffn_shape expert_shape() const noexcept { return {shape_.E, shape_.M, shape_.H}; }
  std::int64_t most_sequences() const noexcept {
    return shape_.sequence == 0 ? (shape_.T == 0 ? 0 : 1) : shape_.T / shape_.sequence;
  }
  std::int64_t most_slots() const noexcept { return most_sequences() * L(); }

  template <class V>
  static matrix_view<V> take(memory& scratch, std::int64_t rows, std::int64_t cols,
                             call_site site) {
    return {scratch.take<V>(rows * cols, scratch_rule, site), rows, cols};
  }

  /// The tokens of each sequence, and the slots of each expert: one source for each sequence.
  struct slots_of_call {
    std::int64_t S, n, L, M;
    row_segments tokens, slots;

    slots_of_call(soft_moe const& layer, std::int64_t T, memory& scratch, call_site site)
        : S(layer.shape_.sequence == 0 ? std::max<std::int64_t>(T, 1) : layer.shape_.sequence),
          n(T / S),
          L(layer.L()),
          M(layer.shape_.M) {
      int const E = layer.shape_.E, p = layer.shape_.slots;
      auto const ids = [&](std::int64_t count) {
        return scratch.take<std::int32_t>(count, scratch_rule, site);
      };
      std::int64_t const sources = std::max<std::int64_t>(n, 1);  // without tokens one, empty
      std::int32_t *const begin = ids(n), *const used = ids(n), *const slot = ids(sources * E),
                          *const filled = ids(sources * E);
      std::fill_n(slot, sources * E, 0);
      std::fill_n(filled, sources * E, 0);
      for (std::int64_t q = 0; q < n; ++q) {
        begin[q] = static_cast<std::int32_t>(q * S);
        used[q] = static_cast<std::int32_t>(S);
        for (int e = 0; e < E; ++e) {
          slot[e * n + q] = static_cast<std::int32_t>(q * L + std::int64_t{e} * p);
          filled[e * n + q] = p;
        }
      }
      tokens = {static_cast<int>(n), begin, used};
      slots = {E, slot, filled, static_cast<int>(sources)};
    }
    std::int64_t rows() const noexcept { return n * L; }
    template <class V>
    stacked_view<V> stack(matrix_view<V> const& of_slots) const noexcept {
      return {of_slots.data(), n, L, M};
    }
  };

  /// The parts of `saved` that a call of fewer tokens uses.
  template <class V>
  static soft_moe_saved<V> views_of(soft_moe_saved<V> const& saved, slots_of_call const& cut) {
    soft_moe_saved<V> kept;
    std::int64_t const T = cut.n * cut.S;
    kept.dispatch = {saved.dispatch.data(), T, cut.L};
    kept.combine = {saved.combine.data(), T, cut.L};
    kept.slots_in = {saved.slots_in.data(), cut.rows(), cut.M};
    kept.slots_out = {saved.slots_out.data(), cut.rows(), cut.M};
    return kept;
  }

  template <class V>
  void expect_arguments(weights<V const> const& parameters, matrix_view<V const> tokens,
                        matrix_view<V> out, soft_moe_saved<V> const& saved, call_site site) const {
    std::int64_t const T = tokens.rows(), S = shape_.sequence;
    expects(T >= 0 && T <= shape_.T && (S == 0 || T % S == 0),
            "soft_moe: T is within the bound of the layer and a multiple of sequence", site,
            {{"T", T}, {"most", shape_.T}, {"sequence", S}});
    expects(saved.dispatch.rows() == shape_.T && saved.dispatch.cols() == L() &&
                saved.slots_in.rows() == most_slots() && saved.slots_in.cols() == shape_.M,
            "soft_moe: saved was made for this layer", site,
            {{"T", saved.dispatch.rows()}, {"L", saved.dispatch.cols()}});
    expects(tokens.cols() == shape_.M && tokens.ld() >= shape_.M && out.rows() == T &&
                out.cols() == shape_.M && out.ld() >= shape_.M && !overlap(tokens, out),
            "soft_moe: tokens and the other side are [T,M], ld >= M, and do not overlap", site,
            {{"tokens.cols", tokens.cols()},
             {"other rows", out.rows()},
             {"other cols", out.cols()},
             {"T", T},
             {"M", shape_.M}});
    expects(parameters.phi.rows() == shape_.M && parameters.phi.cols() == L() &&
                parameters.scale.size() == 1,
            "soft_moe: phi is [M,L] and scale [1]", site,
            {{"phi.rows", parameters.phi.rows()},
             {"phi.cols", parameters.phi.cols()},
             {"scale", parameters.scale.size()},
             {"M", shape_.M},
             {"L", L()}});
  }

  Experts experts_;
  soft_moe_shape shape_;
};

}  // namespace moe::inline MOE_ABI
