// Cuts a product over experts into tasks: rows by columns of each.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI::detail::gemm {

/// Tasks of a grouped product: for each expert `chunks(p)` x `panels`. Task ids follow the experts.
class task_list {
 public:
  template <class Chunks>
  task_list(int P, std::int64_t panels, Chunks const& chunks, std::int64_t* first)
      : first_(first), experts_(P), panels_(panels) {
    first_[0] = 0;
    for (int p = 0; p < P; ++p) first_[p + 1] = first_[p] + chunks(p) * panels;
  }
  std::int64_t size() const noexcept { return first_[experts_]; }

  struct task {
    int expert;
    std::int64_t chunk, panel;
  };
  task operator[](std::int64_t i) const noexcept {
    auto const after = std::upper_bound(first_, first_ + experts_ + 1, i);
    auto const p = static_cast<int>(after - first_) - 1;
    return {p, (i - first_[p]) / panels_, (i - first_[p]) % panels_};
  }

 private:
  std::int64_t* first_;  // [P+1]
  int experts_;
  std::int64_t panels_;
};

}  // namespace moe::inline MOE_ABI::detail::gemm
