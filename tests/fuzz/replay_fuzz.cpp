// Fuzzing load_routing: any bytes give a format_error or a routing that saves to the same bytes.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include <moe/routing/replay.hpp>

namespace {

template <class V>
void try_one(std::vector<std::byte> const& bytes) {
  try {
    auto const r = moe::load_routing<V>(bytes);
    std::vector<std::byte> again(saved_routing_bytes(r));
    save_routing(r, moe::vector_view<std::byte>(again));
    if (again != bytes) std::abort();
  } catch (moe::format_error const&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  if (size == 0) return 0;
  auto const* first = reinterpret_cast<std::byte const*>(data) + 1;
  std::vector<std::byte> bytes(first, first + size - 1);
  // A fuzzer does not find the magic and the checksum: the first byte says whether they are made right.
  if ((data[0] & 1) != 0 && bytes.size() >= 16) {
    std::transform(std::begin(moe::detail::routing_magic), std::end(moe::detail::routing_magic),
                   bytes.begin(), [](char c) { return static_cast<std::byte>(c); });
    moe::detail::put(bytes.data() + bytes.size() - 8,
                     moe::detail::fnv1a(bytes.data(), static_cast<std::int64_t>(bytes.size()) - 8));
  }
  if ((data[0] & 2) != 0)
    try_one<float>(bytes);
  else
    try_one<double>(bytes);
  return 0;
}
