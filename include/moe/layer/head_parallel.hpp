// Head parallelism: tokens are cut into heads, and each rank runs the layers of its heads for all tokens.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/comm/all_to_all.hpp>
#include <moe/comm/collectives.hpp>
#include <moe/comm/communicator.hpp>
#include <moe/comm/token_exchange.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/layer/layer_types.hpp>

namespace moe::inline MOE_ABI {

/// What the heads of a rank keep from forward to backward. @tparam LayerSaved  What a layer keeps.
template <class V, class LayerSaved>
struct head_saved {
  V* tokens = nullptr;           ///< [T of all ranks, own heads * width]
  std::int64_t* ids = nullptr;   ///< [T of all ranks]
  std::uint8_t* live = nullptr;  ///< [T of all ranks]
  LayerSaved* head = nullptr;    ///< [own heads]
  std::uint64_t binding = 0;  ///< Of which numbers of tokens a forward has filled it; 0: of none.
};

/// A layer for each of several heads of tokens [T, heads * width], with a router and experts of its own.
/// Each of R ranks owns heads / R of them: it gets their columns of the tokens of all ranks *before*
/// routing, and gives back what their layers make of them. So an exchange has the same size whatever the
/// routing and the number of choices K are, every rank has the same work of exchange, and no counts are
/// exchanged but those of tokens, once.
///
///     moe::head_parallel layer(moe::moe_layer(preset, experts, {.T = of_all, .M = width, ...}), heads, comm);
///     if (!layer.bind(T, until)) ...          // again when a rank has another number of tokens
///     layer.forward<float>(exec, parameters, x, ids, out, saved, scratch);
///
/// Collective. Results are those of one rank with all tokens, those of rank 0 first, and all heads; so
/// losses and capacity are of the tokens of all ranks. The gradient of a head's parameters is complete at
/// its owner: nothing is summed over ranks, but see `reduce_gradients` on the scale.
/// @tparam Layer  `moe_layer`, `residual_layer`, or what is called like them.
/// Source. "Multi-Head LatentMoE and Head Parallel", 2026 (arXiv 2602.04870).
template <class Layer, communicator C>
class head_parallel {
  template <class V>
  using layer_saved_of = decltype(std::declval<Layer const&>().template carve_saved<V>(memory{}));

 public:
  template <class V>
  using saved_type = head_saved<V, layer_saved_of<V>>;

  /// @param layer    Of one head: shape().M is its width, shape().T at least the tokens of all ranks.
  /// @param comm     Must outlive this.
  /// @param timeout  Of each exchange.
  /// @throws precondition_error unless heads >= 1 is a multiple of the number of ranks.
  head_parallel(Layer const& layer, int heads, C& comm,
                std::chrono::nanoseconds timeout = std::chrono::seconds(60),
                call_site site = call_site::here())
      : layer_(layer), heads_(heads), comm_(&comm), timeout_(timeout) {
    expects(heads >= 1 && comm.size() >= 1 && heads % comm.size() == 0,
            "head_parallel: heads >= 1, a multiple of R", site,
            {{"heads", heads}, {"R", comm.size()}});
    sent_.resize(static_cast<std::size_t>(R()));
    counts_.resize(sent_.size());
  }

  Layer const& layer() const noexcept { return layer_; }
  int heads() const noexcept { return heads_; }
  int own_heads() const noexcept { return heads_ / R(); }
  int first_head() const noexcept { return comm_->rank() * own_heads(); }

  /// Of the own heads.
  std::int64_t parameter_elements() const noexcept {
    return own_heads() * layer_.parameter_elements();
  }
  /// The parameters, or gradients, of own head j in an array of parameter_elements(): what the layer's
  /// carve gives.
  template <class V>
  auto carve(V* data, int j) const noexcept {
    return layer_.carve(data + j * layer_.parameter_elements());
  }

  template <class V>
  std::size_t saved_bytes() const noexcept {
    std::int64_t const T = layer_.shape().T;
    memory_size size;
    size.add<V>(T * own_width()).template add<std::int64_t>(T).template add<std::uint8_t>(T);
    size.add<layer_saved_of<V>>(own_heads());
    for (int j = 0; j < own_heads(); ++j) size.add<std::byte>(layer_bytes<V>());
    return size.bytes();
  }
  /// @throws precondition_error if `from` has fewer than saved_bytes<V>() bytes.
  template <class V>
  saved_type<V> carve_saved(memory from, call_site site = call_site::here()) const {
    char const* const enough = "head_parallel::carve_saved: memory holds saved_bytes()";
    std::int64_t const T = layer_.shape().T;
    saved_type<V> saved;
    saved.tokens = from.take<V>(T * own_width(), enough, site);
    saved.ids = from.take<std::int64_t>(T, enough, site);
    saved.live = from.take<std::uint8_t>(T, enough, site);
    saved.head = from.take<layer_saved_of<V>>(own_heads(), enough, site);
    for (int j = 0; j < own_heads(); ++j) {
      std::byte* const room = from.take<std::byte>(layer_bytes<V>(), enough, site);
      std::construct_at(
          saved.head + j,
          layer_.template carve_saved<V>({room, static_cast<std::size_t>(layer_bytes<V>())}, site));
    }
    return saved;
  }
  /// Bytes for forward and backward.
  /// @param T  Most tokens of this rank.
  template <class V>
  std::size_t scratch_bytes(cpu const& exec, std::int64_t T) const noexcept {
    std::int64_t const all = layer_.shape().T;
    memory_size size;
    size.add<V>(T * heads_ * width());
    for (int i = 0; i < 2; ++i) size.add<V>(all * own_width());
    memory_size of_tags;
    of_tags.add<tag>(all);
    return size.bytes() + std::max(of_tags.bytes() + all_gather_scratch(R()),
                                   layer_.template scratch_bytes<V>(exec));
  }

  /// Tells all ranks how many tokens this one has in the calls that follow.
  /// @throws precondition_error if T < 0, or if all ranks have more than the layer's bound.
  /// @note  Collective. If it fails, the communicator has aborted.
  outcome bind(std::int64_t T, deadline until, call_site site = call_site::here()) {
    expects(T >= 0, "head_parallel::bind: T >= 0", site, {{"T", T}});
    std::fill(sent_.begin(), sent_.end(), T);
    outcome const told = all_to_all<std::int64_t>(*comm_, sent_, counts_, until, site);
    if (told) set_bound(site);
    return told;
  }
  /// Every rank has T. No messages.
  void bind_equal(std::int64_t T, call_site site = call_site::here()) {
    expects(T >= 0, "head_parallel::bind_equal: T >= 0", site, {{"T", T}});
    std::fill(sent_.begin(), sent_.end(), T);
    std::fill(counts_.begin(), counts_.end(), T);
    set_bound(site);
  }

  /// @param parameters  [parameter_elements()] of the own heads.
  /// @param tokens      [T, heads * width] of this rank, as many as are bound.
  /// @param ids         Of this rank's tokens. Draws of head h are keyed by seed + h * an odd constant.
  /// @param out         [T, heads * width] out; must not overlap tokens.
  /// @param saved       Made by carve_saved; filled.
  /// @param scratch     scratch_bytes<V>(exec, T).
  /// @return The losses, summed over the own heads.
  /// @throws precondition_error if T is not bound, shapes disagree or memory is too small;
  ///         exchange_error if an exchange ends otherwise than well. The communicator has aborted, unless
  ///         nothing was sent yet.
  /// @note  Bitwise the same for any number of threads and ranks. The exchange allocates its arrays of R
  ///        messages, and nothing else does.
  /// @cost  Sends T (R - 1) / R of the tokens' elements there and as many back, and 16 bytes for each
  ///        token to each rank.
  template <class V>
  layer_losses forward(cpu const& exec, vector_view<std::type_identity_t<V> const> parameters,
                       matrix_view<std::type_identity_t<V> const> tokens, batch const& ids,
                       matrix_view<std::type_identity_t<V>> out, saved_type<V>& saved,
                       memory scratch, call_site site = call_site::here()) const {
    expect_sides<V>(tokens, out, site);
    expects(parameters.size() == parameter_elements(),
            "head_parallel: parameters are [parameter_elements()]", site,
            {{"size", parameters.size()}, {"parameter_elements()", parameter_elements()}});
    saved.binding = 0;
    V* const packed = take<V>(scratch, tokens.rows() * heads_ * width(), site);
    matrix_view<V> const made(take<V>(scratch, total_ * own_width(), site), total_, own_width());
    matrix_view<V> const received(saved.tokens, total_, own_width());
    layer_losses losses;
    aborting([&] {
      to_heads<V>(exec, tokens, packed, received, site);
      batch of_all = gather_tags(ids, saved, scratch, site);
      for (int j = 0; j < own_heads(); ++j) {
        of_all.seed = ids.seed + static_cast<std::uint64_t>(first_head() + j) * seed_of_head;
        layer_losses const own = layer_.forward(
            exec, carve(parameters.data(), j), matrix_view<V const>(of_head(received, j)), of_all,
            of_head(made, j), saved.head[j], scratch, no_hooks{}, site);
        losses.balance += own.balance;
        losses.z += own.z;
      }
      from_heads<V>(exec, made, packed, out, site);
    });
    saved.binding = binding_;
    return losses;
  }

  /// The gradient of f(out) + the losses of all heads, each times its weight.
  ///
  /// @param parameters  As forward was given them.
  /// @param dout        [T, heads * width].
  /// @param saved       As forward left it.
  /// @param dtokens     [T, heads * width] out; must not overlap dout.
  /// @param gradients   [parameter_elements()] of the own heads; assigned, or added to.
  /// @throws precondition_error, too, if tokens have been bound anew since forward.
  template <class V>
  void backward(cpu const& exec, vector_view<std::type_identity_t<V> const> parameters,
                matrix_view<std::type_identity_t<V> const> dout, loss_weights const& losses,
                saved_type<V> const& saved, matrix_view<std::type_identity_t<V>> dtokens,
                vector_view<std::type_identity_t<V>> gradients, update how, memory scratch,
                call_site site = call_site::here()) const {
    expect_sides<V>(dout, dtokens, site);
    expects(saved.binding != 0 && saved.binding == binding_,
            "head_parallel::backward: saved was filled by a forward, and nothing bound since",
            site);
    expects(parameters.size() == parameter_elements() && gradients.size() == parameter_elements(),
            "head_parallel: parameters and gradients are [parameter_elements()]", site,
            {{"size", parameters.size()},
             {"gradients", gradients.size()},
             {"parameter_elements()", parameter_elements()}});
    V* const packed = take<V>(scratch, dout.rows() * heads_ * width(), site);
    matrix_view<V> const received(saved.tokens, total_, own_width());
    matrix_view<V> const dmade(take<V>(scratch, total_ * own_width(), site), total_, own_width());
    matrix_view<V> const dreceived(take<V>(scratch, total_ * own_width(), site), total_,
                                   own_width());
    aborting([&] {
      to_heads<V>(exec, dout, packed, dmade, site);
      for (int j = 0; j < own_heads(); ++j)
        layer_.backward(exec, carve(parameters.data(), j),
                        matrix_view<V const>(of_head(received, j)),
                        matrix_view<V const>(of_head(dmade, j)), losses, saved.head[j],
                        of_head(dreceived, j), carve(gradients.data(), j), how, scratch, site);
      from_heads<V>(exec, dreceived, packed, dtokens, site);
    });
  }

 private:
  static constexpr std::uint64_t seed_of_head = 0x9e3779b97f4a7c15;

  /// What layers know of a token of another rank.
  struct tag {
    std::int64_t id;
    std::int64_t live;
  };

  int R() const noexcept { return comm_->size(); }
  std::int64_t width() const noexcept { return layer_.shape().M; }
  std::int64_t own_width() const noexcept { return own_heads() * width(); }
  template <class V>
  std::int64_t layer_bytes() const noexcept {
    return static_cast<std::int64_t>(layer_.template saved_bytes<V>());
  }
  template <class T>
  static T* take(memory& scratch, std::int64_t count, call_site site) {
    return scratch.take<T>(count, "head_parallel: scratch >= scratch_bytes<V>(exec, T)", site);
  }
  template <class V>
  matrix_view<V> of_head(matrix_view<V> rows, int j) const noexcept {
    return {rows.data() + j * width(), rows.rows(), width(), rows.ld()};
  }
  std::int64_t own_tokens() const noexcept { return sent_[0]; }

  void set_bound(call_site site) {
    total_ = 0;
    for (std::int64_t const n : counts_) total_ += n;
    ++binding_;
    expects(total_ <= layer_.shape().T, "head_parallel: the layer has room for all ranks' tokens",
            site, {{"tokens of all ranks", total_}, {"most", layer_.shape().T}});
  }
  template <class V>
  void expect_sides(matrix_view<V const> from, matrix_view<V> to, call_site site) const {
    std::int64_t const W = heads_ * width();
    expects(binding_ != 0 && total_ <= layer_.shape().T && from.rows() == own_tokens(),
            "head_parallel: as many tokens as are bound", site,
            {{"rows", from.rows()}, {"bound", own_tokens()}});
    expects(from.cols() == W && to.rows() == from.rows() && to.cols() == W && !overlap(from, to),
            "head_parallel: both sides are [T, heads * width], apart", site,
            {{"cols", from.cols()},
             {"other rows", to.rows()},
             {"other cols", to.cols()},
             {"heads * width", W}});
  }

  /// Peers must not wait for a rank that has thrown.
  template <class F>
  void aborting(F const& f) const {
    try {
      f();
    } catch (...) {
      comm_->abort();
      throw;
    }
  }
  void throw_unless(outcome const& end) const {
    if (!end) detail::throw_exchange_error("head_parallel: exchange of heads", end);
  }

  /// Each rank's columns of all tokens, packed [R,T,own_width], to that rank.
  template <class V>
  void to_heads(cpu const& exec, matrix_view<V const> from, V* packed, matrix_view<V> rows,
                call_site site) const {
    std::int64_t const T = from.rows(), w = own_width();
    exec.split(T, 16, [&](std::int64_t first, std::int64_t last, int) {
      for (std::int64_t t = first; t < last; ++t)
        for (std::int64_t r = 0; r < R(); ++r)
          std::copy_n(from.row(t) + r * w, w, packed + (r * T + t) * w);
    });
    throw_unless(all_to_all_v<V>(*comm_, {packed, R() * T, w}, sent_, rows, counts_,
                                 within(timeout_), site));
  }
  template <class V>
  void from_heads(cpu const& exec, matrix_view<V const> rows, V* packed, matrix_view<V> to,
                  call_site site) const {
    std::int64_t const T = to.rows(), w = own_width();
    throw_unless(all_to_all_v<V>(*comm_, rows, counts_, {packed, R() * T, w}, sent_,
                                 within(timeout_), site));
    exec.split(T, 16, [&](std::int64_t first, std::int64_t last, int) {
      for (std::int64_t t = first; t < last; ++t)
        for (std::int64_t r = 0; r < R(); ++r)
          std::copy_n(packed + (r * T + t) * w, w, to.row(t) + r * w);
    });
  }

  /// The batch of all ranks' tokens.
  template <class V>
  batch gather_tags(batch const& ids, saved_type<V>& saved, memory scratch, call_site site) const {
    tag* const all = take<tag>(scratch, total_, site);
    tag* own = all;
    for (int r = 0; r < comm_->rank(); ++r) own += counts_[static_cast<std::size_t>(r)];
    for (std::int64_t t = 0; t < own_tokens(); ++t) own[t] = {ids.at(t).id, ids.is_live(t) ? 1 : 0};
    throw_unless(all_gather_rows<tag>(*comm_, {own, own_tokens(), 1}, counts_, {all, total_, 1},
                                      scratch, within(timeout_), site));
    for (std::int64_t t = 0; t < total_; ++t) {
      saved.ids[t] = all[t].id;
      saved.live[t] = static_cast<std::uint8_t>(all[t].live);
    }
    batch of_all = ids;
    of_all.ids = saved.ids;
    of_all.live = saved.live;
    of_all.source = nullptr;
    return of_all;
  }

  Layer layer_;
  int heads_;
  C* comm_;
  std::chrono::nanoseconds timeout_;
  std::vector<std::int64_t> sent_;    // [R] tokens of this rank, to each
  std::vector<std::int64_t> counts_;  // [R] tokens of each
  std::int64_t total_ = 0;
  std::uint64_t binding_ = 0;
};

}  // namespace moe::inline MOE_ABI
