// Save a routing to bytes and load it back, so that it can be replayed or forced.
// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {

/// What is saved of a routing besides its expert ids.
struct saved_parts {
  bool weight = true;
  bool score = true;
};

/// A routing that was loaded, with its arrays: those that were not saved are null. Its `tokens`
/// (mask, ids, seed) are not saved; set them as for the call that is replayed. Not copyable.
template <std::floating_point V>
class saved_routing : public basic_routing<V> {
 public:
  saved_routing() = default;
  saved_routing(saved_routing&&) noexcept = default;
  saved_routing& operator=(saved_routing&&) noexcept = default;

 private:
  template <std::floating_point W>
  friend saved_routing<W> load_routing(vector_view<std::byte const> bytes);

  std::vector<std::int32_t> begin_, expert_;
  std::vector<V> weight_, score_;
};

namespace detail {

// The format, all numbers little-endian:
//   8 bytes   "moe-rout"
//   u32       version = 1
//   u32       parts: 1 token_begin, 2 weight, 4 score, 8 values are double
//   u64 T, u32 K, u32 E, u64 pairs
//   i32       token_begin [T+1]   if parts & 1
//   i32       expert [pairs]
//   V         weight [pairs]      if parts & 2
//   V         score [pairs]       if parts & 4
//   u64       FNV-1a of all bytes before it
inline constexpr char routing_magic[] = {'m', 'o', 'e', '-', 'r', 'o', 'u', 't'};
inline constexpr std::uint32_t routing_version = 1;
inline constexpr std::int64_t routing_header_bytes = 40;
enum routing_part : std::uint32_t {
  part_begin = 1,
  part_weight = 2,
  part_score = 4,
  part_double = 8
};

inline std::uint64_t fnv1a(std::byte const* data, std::int64_t size) noexcept {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (std::int64_t i = 0; i < size; ++i)
    hash = (hash ^ std::to_integer<std::uint64_t>(data[i])) * 0x100000001b3u;
  return hash;
}

template <class T>
using bits_of = std::conditional_t<sizeof(T) == 8, std::uint64_t, std::uint32_t>;

template <class T>
std::byte* put(std::byte* to, T value) noexcept {
  auto const bits = __builtin_bit_cast(bits_of<T>, value);
  for (std::size_t i = 0; i < sizeof(T); ++i) *to++ = static_cast<std::byte>(bits >> 8 * i & 0xff);
  return to;
}
template <class T>
std::byte* put_all(std::byte* to, T const* values, std::int64_t n) noexcept {
  for (std::int64_t i = 0; i < n; ++i) to = put(to, values[i]);
  return to;
}

template <class T>
T get(std::byte const*& from) noexcept {
  bits_of<T> bits = 0;
  for (std::size_t i = 0; i < sizeof(T); ++i) bits |= std::to_integer<bits_of<T>>(*from++) << 8 * i;
  return __builtin_bit_cast(T, bits);
}
template <class T>
void get_all(std::byte const*& from, std::vector<T>& values, std::int64_t n) {
  values.reserve(static_cast<std::size_t>(n) + 1);  // a part without elements is not null, either
  values.resize(static_cast<std::size_t>(n));
  for (T& value : values) value = get<T>(from);
}

/// What a saved routing of these parts takes. @pre 0 <= T, pairs < 2^31.
constexpr std::int64_t saved_bytes(std::uint32_t parts, std::int64_t T,
                                   std::int64_t pairs) noexcept {
  std::int64_t const value = (parts & part_double) != 0 ? 8 : 4;
  return routing_header_bytes + ((parts & part_begin) != 0 ? 4 * (T + 1) : 0) + 4 * pairs +
         ((parts & part_weight) != 0 ? value * pairs : 0) +
         ((parts & part_score) != 0 ? value * pairs : 0) + 8;
}

template <class V>
constexpr std::uint32_t parts_of(basic_routing<V> const& in, saved_parts keep) noexcept {
  return (in.token_begin != nullptr ? part_begin : 0u) |
         (keep.weight && in.weight != nullptr ? part_weight : 0u) |
         (keep.score && in.score != nullptr ? part_score : 0u) |
         (sizeof(V) == 8 ? part_double : 0u);
}

inline void expects_format(bool condition, char const* what) {
  if (!condition) throw format_error(std::string("load_routing: ") + what);
}

}  // namespace detail

/// Bytes that save_routing writes.
template <std::floating_point V>
std::size_t saved_routing_bytes(basic_routing<V> const& in, saved_parts keep = {}) noexcept {
  return static_cast<std::size_t>(
      detail::saved_bytes(detail::parts_of(in, keep), in.T, in.pairs()));
}

/// Writes a routing: ids, token_begin where K varies, and those of weight and score that are kept
/// and not null. The mask, the ids and the seed of the tokens are not saved.
///
/// @param in   Its ids are in [0, E), no_candidate or invalid_token: load_routing refuses others.
/// @param out  [saved_routing_bytes(in, keep)] out.
/// @throws precondition_error unless 0 <= T and pairs < 2^31, 1 <= K <= 16, E >= 1, expert is given
///         and out has that size.
/// @cost   O(T K).
template <std::floating_point V>
void save_routing(basic_routing<V> const& in, vector_view<std::byte> out, saved_parts keep = {},
                  call_site site = call_site::here()) {
  constexpr std::int64_t most = 0x7fffffff;
  expects(in.T >= 0 && in.T < most && in.K >= 1 && in.K <= max_choices && in.E >= 1 &&
              in.pairs() >= 0 && in.pairs() < most && (in.pairs() == 0 || in.expert != nullptr),
          "save_routing: 0 <= T and pairs < 2^31, 1 <= K <= 16, E >= 1, expert is given", site,
          {{"T", in.T}, {"K", in.K}, {"E", in.E}});
  std::uint32_t const parts = detail::parts_of(in, keep);
  std::int64_t const pairs = in.pairs(), bytes = detail::saved_bytes(parts, in.T, pairs);
  expects(out.size() == bytes, "save_routing: out has saved_routing_bytes(in, keep) bytes", site,
          {{"size", out.size()}, {"bytes", bytes}});
  std::byte* to = out.data();
  for (char c : detail::routing_magic) *to++ = static_cast<std::byte>(c);
  to = detail::put(to, detail::routing_version);
  to = detail::put(to, parts);
  to = detail::put(to, static_cast<std::uint64_t>(in.T));
  to = detail::put(to, static_cast<std::uint32_t>(in.K));
  to = detail::put(to, static_cast<std::uint32_t>(in.E));
  to = detail::put(to, static_cast<std::uint64_t>(pairs));
  if ((parts & detail::part_begin) != 0) to = detail::put_all(to, in.token_begin, in.T + 1);
  to = detail::put_all(to, in.expert, pairs);
  if ((parts & detail::part_weight) != 0) to = detail::put_all(to, in.weight, pairs);
  if ((parts & detail::part_score) != 0) to = detail::put_all(to, in.score, pairs);
  detail::put(to, detail::fnv1a(out.data(), bytes - 8));
}

/// Reads what save_routing wrote, on any machine.
///
/// @tparam V  The type of the saved values.
/// @throws format_error if the bytes are not a routing of this version and type: wrong magic, sizes
///         that do not agree with each other or with the number of bytes, an id that is no expert, a
///         token_begin that does not rise from 0 by at most K, or a wrong checksum.
/// @note   Allocates no more than a small multiple of bytes.size().
template <std::floating_point V>
saved_routing<V> load_routing(vector_view<std::byte const> bytes) {
  using detail::expects_format;
  expects_format(bytes.size() >= detail::routing_header_bytes + 8, "too short for a header");
  std::byte const* from = bytes.data();
  bool magic = true;
  for (char c : detail::routing_magic) magic = *from++ == static_cast<std::byte>(c) && magic;
  expects_format(magic, "not a saved routing");
  expects_format(detail::get<std::uint32_t>(from) == detail::routing_version, "another version");
  auto const parts = detail::get<std::uint32_t>(from);
  auto const T = detail::get<std::uint64_t>(from);
  auto const K = detail::get<std::uint32_t>(from);
  auto const E = detail::get<std::uint32_t>(from);
  auto const pairs = detail::get<std::uint64_t>(from);
  constexpr std::uint64_t most = 0x7fffffff;
  expects_format(parts < 16, "unknown parts");
  expects_format(((parts & detail::part_double) != 0) == (sizeof(V) == 8),
                 "values of another type");
  expects_format(T < most && pairs < most && K >= 1 && K <= max_choices && E >= 1 && E < most,
                 "sizes out of range");
  expects_format((parts & detail::part_begin) != 0 ? pairs <= T * K : pairs == T * K,
                 "pairs do not agree with T and K");
  expects_format(bytes.size() == detail::saved_bytes(parts, static_cast<std::int64_t>(T),
                                                     static_cast<std::int64_t>(pairs)),
                 "number of bytes does not agree with the header");
  std::byte const* end = bytes.data() + bytes.size() - 8;
  expects_format(detail::fnv1a(bytes.data(), bytes.size() - 8) == detail::get<std::uint64_t>(end),
                 "wrong checksum");

  saved_routing<V> out;
  auto const n = static_cast<std::int64_t>(pairs);
  out.T = static_cast<std::int64_t>(T);
  out.K = static_cast<int>(K);
  out.E = static_cast<int>(E);
  if ((parts & detail::part_begin) != 0) {
    detail::get_all(from, out.begin_, out.T + 1);
    bool rises = out.begin_.front() == 0 && out.begin_.back() == n;
    for (std::size_t t = 0; t < T; ++t)
      rises = rises && out.begin_[t] >= 0 && out.begin_[t + 1] >= out.begin_[t] &&
              out.begin_[t + 1] - out.begin_[t] <= out.K;
    expects_format(rises, "token_begin does not rise from 0 by at most K");
    out.token_begin = out.begin_.data();
  }
  detail::get_all(from, out.expert_, n);
  for (std::int32_t e : out.expert_)
    expects_format(e >= invalid_token && e < out.E, "an id that is no expert");
  out.expert = out.expert_.data();
  if ((parts & detail::part_weight) != 0) {
    detail::get_all(from, out.weight_, n);
    out.weight = out.weight_.data();
  }
  if ((parts & detail::part_score) != 0) {
    detail::get_all(from, out.score_, n);
    out.score = out.score_.data();
  }
  return out;
}

}  // namespace moe::inline MOE_ABI
