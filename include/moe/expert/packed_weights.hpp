// Weights of experts in the order in which kernels read them: packed once, saved, memory-mapped.
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
#include <moe/core/scalar.hpp>
#include <moe/core/view.hpp>
#include <moe/expert/detail/packed_shapes.hpp>
#include <moe/expert/ffn_weights.hpp>
#include <moe/expert/segments.hpp>

namespace moe::inline MOE_ABI {

/// What a weight may be in memory, packed or not.
template <class W>
concept weight_number = std::same_as<W, float> || std::same_as<W, bf16> || std::same_as<W, half>;
/// Weights that share a scale with others; see packed_blocks.hpp.
template <class W>
concept weight_blocks = std::same_as<W, int8_blocks> || std::same_as<W, int4_blocks>;
/// What packed weights may be in memory.
template <class W>
concept packable = weight_number<W> || weight_blocks<W> || std::same_as<W, fp8_blocks>;

/// Which index of a source matrix is the row.
enum class orientation : std::uint8_t {
  in_out,  ///< [in, out], as `ffn_weights` has them: up and gate [P,M,H], down [P,H,M].
  out_in  ///< [out, in], as checkpoints of most frameworks have them: up, gate [P,H,M], down [P,M,H].
};

namespace detail::packed {

/// Where things lie in one expert.
template <class W>
struct expert_layout {
  std::int64_t M, H;          ///< padded
  std::int64_t input_panels;  ///< of up and gate
  std::int64_t input_size;    ///< elements of W of these
  std::int64_t size;          ///< and of down

  constexpr expert_layout(ffn_shape const& shape, bool gated) noexcept
      : M(padded(shape.M)),
        H(padded(shape.H)),
        input_panels(H / panel_width * (gated ? 2 : 1)),
        input_size(input_panels * panel_size<W>(M)),
        size(input_size + M / panel_width * panel_size<W>(H)) {}
  constexpr std::int64_t bytes() const noexcept {
    return size * static_cast<std::int64_t>(sizeof(W));
  }

  /// Element (k, j) of a matrix of `depth` padded rows.
  static constexpr std::int64_t at(std::int64_t depth, std::int64_t k, std::int64_t j) noexcept {
    constexpr int together = format<W>::depth;  // of numbers: rows that share a line
    return (j / panel_width * depth + k / together * together) * panel_width +
           j % panel_width * together + k % together;
  }
  /// Element (k, j) of up or of gate, where both are interleaved by half panels.
  constexpr std::int64_t at_input(std::int64_t k, std::int64_t j, bool gated,
                                  bool of_gate) const noexcept {
    if (!gated) return at(M, k, j);
    return at(M, k, j / half_width * panel_width + (of_gate ? 0 : half_width) + j % half_width);
  }
  constexpr std::int64_t at_down(std::int64_t k, std::int64_t j) const noexcept {
    return input_size + at(H, k, j);
  }
};

}  // namespace detail::packed

/// Bytes of the packed weights of shape.P experts.
template <packable W>
constexpr std::size_t packed_bytes(ffn_shape const& shape, bool gated) noexcept {
  return static_cast<std::size_t>(shape.P * detail::packed::expert_layout<W>(shape, gated).bytes());
}

/// A view of packed weights, and of biases that are not packed. Does not own them.
///
/// The bytes are the same for every instruction set and hold nothing but weights, so that they may be
/// written to a file and mapped. With M and H rounded up to multiples of 32, experts follow one another,
/// each: up [H/32][M][32], or of a gated activation up and gate [H/16][M][32], where the first 16 columns
/// of 32 are of gate and the last 16 of up; then down [M/32][H][32]. So 32 columns of a matrix stand
/// side by side for each of its rows: a *panel*. Kernels read a panel from its first byte to its last, and
/// then the next. Of bf16, rows k and k + 1 of a column stand beside each other: [M/2][32][2]. What is beyond
/// the true M and H is 0. Little endian, as the machine.
template <class W>
class packed_weights {
 public:
  static_assert(packable<std::remove_const_t<W>>);
  using value_type = std::remove_const_t<W>;
  using bytes_pointer = std::conditional_t<std::is_const_v<W>, std::byte const*, std::byte*>;

  matrix_view<float const> up_bias;    ///< [P,H] or absent
  matrix_view<float const> gate_bias;  ///< [P,H] or absent
  matrix_view<float const> down_bias;  ///< [P,M] or absent

  constexpr packed_weights() noexcept = default;
  /// @param data   packed_bytes<W>(shape, gated) bytes, aligned to a cache line (64).
  /// @param bytes  What there is.
  /// @throws precondition_error if there are fewer bytes or they are not aligned.
  packed_weights(bytes_pointer data, std::size_t bytes, ffn_shape const& shape, bool gated,
                 call_site site = call_site::here())
      : data_(data), shape_(shape), gated_(gated) {
    expects(shape.P >= 0 && shape.M >= 0 && shape.H >= 0, "packed_weights: P, M, H >= 0", site,
            {{"P", shape.P}, {"M", shape.M}, {"H", shape.H}});
    expects(bytes >= packed_bytes<value_type>(shape, gated),
            "packed_weights: bytes >= packed_bytes(shape, gated)", site,
            {{"bytes", bytes}, {"packed_bytes", packed_bytes<value_type>(shape, gated)}});
    expects(reinterpret_cast<std::uintptr_t>(data) % memory::alignment == 0,
            "packed_weights: data is aligned to 64 bytes", site,
            {{"modulo", reinterpret_cast<std::uintptr_t>(data) % memory::alignment}});
  }
  /// A view of mutable weights is a view of constant ones.
  template <std::same_as<value_type> U>
    requires std::is_const_v<W>
  constexpr packed_weights(packed_weights<U> const& other) noexcept
      : up_bias(other.up_bias),
        gate_bias(other.gate_bias),
        down_bias(other.down_bias),
        data_(other.data()),
        shape_(other.shape()),
        gated_(other.gated()) {}

  constexpr bytes_pointer data() const noexcept { return data_; }
  constexpr ffn_shape const& shape() const noexcept { return shape_; }
  constexpr bool gated() const noexcept { return gated_; }
  /// The weights of expert p.
  constexpr W* expert(std::int64_t p) const noexcept {
    return reinterpret_cast<W*>(
        data_ + p * detail::packed::expert_layout<value_type>(shape_, gated_).bytes());
  }

 private:
  bytes_pointer data_ = nullptr;
  ffn_shape shape_{};
  bool gated_ = false;
};

namespace detail::packed {

/// Checks that `source` has experts for [first, ...) of the weights.
template <class W, class S>
void expect_source(packed_weights<W> const& weights, ffn_weights<S> const& source,
                   orientation order, std::int64_t first, call_site site) {
  auto const [P, M, H] = weights.shape();
  bool const turned = order == orientation::out_in;
  auto const fits = [&](auto const& m, std::int64_t in, std::int64_t out) {
    return m.count() == source.up.count() && m.rows() == (turned ? out : in) &&
           m.cols() == (turned ? in : out) && m.ld() >= m.cols();
  };
  expects(fits(source.up, M, H) && fits(source.down, H, M) &&
              (weights.gated() ? fits(source.gate, M, H) : source.gate.absent()),
          "pack: up, gate and down have the shapes of the packed weights in this orientation", site,
          {{"up.rows", source.up.rows()},
           {"up.cols", source.up.cols()},
           {"down.rows", source.down.rows()},
           {"down.cols", source.down.cols()},
           {"M", M},
           {"H", H},
           {"out_in", turned}});
  expects(first >= 0 && first + source.up.count() <= P,
          "pack: experts [first, first + experts of the source) are among P", site,
          {{"first", first}, {"experts", source.up.count()}, {"P", P}});
}

/// Calls f(element of the source, place of it) for all elements of the experts; rows of a matrix are cut
/// over the team. `clear(expert)` is called before for each.
template <class W, class S, class F>
void each_element(cpu const& exec, packed_weights<W> const& weights, ffn_weights<S> const& source,
                  orientation order, std::int64_t first, F const& f) {
  using layout = expert_layout<std::remove_const_t<W>>;
  layout const place(weights.shape(), weights.gated());
  bool const gated = weights.gated();
  auto const part = [&](stacked_view<S> const& all, auto const& at) {
    if (all.absent() || all.cols() == 0) return;
    std::int64_t const rows = all.rows();
    exec.split(all.count() * rows, 8, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) {
        W* const to = weights.expert(first + i / rows);
        S* const row = all[i / rows].row(i % rows);
        for (std::int64_t c = 0; c < all.cols(); ++c)
          f(row[c], to[order == orientation::in_out ? at(i % rows, c) : at(c, i % rows)]);
      }
    });
  };
  part(source.up,
       [&](std::int64_t k, std::int64_t j) { return place.at_input(k, j, gated, false); });
  part(source.gate,
       [&](std::int64_t k, std::int64_t j) { return place.at_input(k, j, gated, true); });
  part(source.down, [&](std::int64_t k, std::int64_t j) { return place.at_down(k, j); });
}

}  // namespace detail::packed

/// Packs experts of row-major weights: all, or those of a source that has fewer, one after another.
///
/// @param source   Weights of float, bf16 or half, with any leading dimensions; biases are not looked at.
/// @param order    How its matrices stand.
/// @param weights  Out: the experts [first, first + source.up.count()).
/// @throws precondition_error if shapes disagree.
/// @note  Each element is converted by way of float, rounded to nearest even. Memory that is touched here
///        first comes from the memory of the threads that pack.
/// @cost  One pass over both; for loading, not for every step.
template <weight_number W, class S>
void pack(cpu const& exec, ffn_weights<S> const& source, orientation order,
          packed_weights<W> const& weights, std::int64_t first = 0,
          call_site site = call_site::here()) {
  static_assert(weight_number<std::remove_const_t<S>>, "pack: sources are of float, bf16 or half");
  detail::packed::expect_source(weights, source, order, first, site);
  detail::packed::expert_layout<W> const layout(weights.shape(), weights.gated());
  exec.each(source.up.count(),
            [&](std::int64_t p, int) { std::fill_n(weights.expert(first + p), layout.size, W{}); });
  detail::packed::each_element(exec, weights, source, order, first, [](S const& from, W& to) {
    if constexpr (std::same_as<W, std::remove_const_t<S>>)
      to = from;
    else
      to = static_cast<W>(static_cast<float>(from));
  });
}

/// The inverse of pack: exact.
///
/// @param out  As the source of pack: experts [first, first + out.up.count()).
template <class W, class S>
  requires weight_number<S> && std::same_as<std::remove_const_t<W>, S>
void unpack(cpu const& exec, packed_weights<W> const& weights, orientation order,
            ffn_weights<S> const& out, std::int64_t first = 0, call_site site = call_site::here()) {
  detail::packed::expect_source(weights, out, order, first, site);
  detail::packed::each_element(exec, weights, out, order, first,
                               [](S& to, W const& from) { to = from; });
}

}  // namespace moe::inline MOE_ABI
