// Where the rows of a bound plan lie while they are moved, and so what its messages are.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <moe/comm/bound_plan.hpp>
#include <moe/comm/communicator.hpp>
#include <moe/comm/exchange_plan.hpp>
#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// Where rows of a buffer lie, or a part of each.
struct buffer_part {
  std::byte* data = nullptr;
  std::size_t stride = 0;  // from one row to the next
  std::size_t bytes = 0;

  std::byte* row(std::int64_t r) const { return data + static_cast<std::size_t>(r) * stride; }
};
struct buffer_rows {
  buffer_part part[2];
};

/// The buffers of one exchange: the caller's rows, and staging rows. Keeps its arrays.
class placed_rows {
 public:
  /// Of each staging buffer.
  static constexpr std::size_t alignment = alignof(std::max_align_t);

  /// Bytes of all staging buffers.
  static std::size_t staging_bytes(bound_plan const& sizes, std::size_t row_bytes) {
    std::size_t total = 0;
    for (std::size_t b = 2; b < sizes.plan().buffers.size(); ++b)
      total += staging_bytes(sizes, row_bytes, b);
    return total;
  }

  /// @param sizes  Must outlive the exchange.
  /// @param in     Nothing is written there: no plan has the input as a target.
  void place(bound_plan const& sizes, std::size_t row_bytes, buffer_rows const& in,
             buffer_rows const& out, std::byte* staging) {
    sizes_ = &sizes;
    row_bytes_ = row_bytes;
    buffers_.assign({in, out});
    for (std::size_t b = 2; b < sizes.plan().buffers.size(); ++b) {
      buffers_.push_back(contiguous(staging));
      staging += staging_bytes(sizes, row_bytes, b);
    }
  }
  /// All buffers one after another from `data` on.
  /// @pre  Rows of a multiple of `alignment`.
  void place(bound_plan const& sizes, std::size_t row_bytes, std::byte* data) {
    row_bytes_ = row_bytes;
    std::byte* const out = data + static_cast<std::size_t>(sizes.input_rows()) * row_bytes;
    place(sizes, row_bytes, contiguous(data), contiguous(out),
          out + static_cast<std::size_t>(sizes.output_rows()) * row_bytes);
  }

  bound_plan const& sizes() const { return *sizes_; }
  buffer_rows const& rows_at(slot_at at) const {
    return buffers_[static_cast<std::size_t>(at.buffer)];
  }
  /// Of contiguous rows.
  std::byte* data(slot_at at) const {
    return rows_at(at).part[0].data +
           static_cast<std::size_t>(sizes_->rows_before(at)) * row_bytes_;
  }
  std::size_t bytes(slot_at at, int count) const {
    return static_cast<std::size_t>(sizes_->rows_before(at, count) - sizes_->rows_before(at)) *
           row_bytes_;
  }

  /// Makes the messages of a phase. Both ends know that one is empty, and neither has it.
  void list_messages(exchange_phase const& phase) {
    sends_.clear();
    receives_.clear();
    for (message const& m : phase.sends)
      if (std::size_t const n = bytes(m.at, m.count); n > 0)
        sends_.push_back({data(m.at), n, m.peer});
    for (message const& m : phase.receives)
      if (std::size_t const n = bytes(m.at, m.count); n > 0)
        receives_.push_back({data(m.at), n, m.peer});
  }
  std::vector<outgoing> const& sends() const { return sends_; }
  std::vector<incoming> const& receives() const { return receives_; }

 private:
  static std::size_t staging_bytes(bound_plan const& sizes, std::size_t row_bytes,
                                   std::size_t buffer) {
    auto const bytes =
        static_cast<std::size_t>(sizes.rows_in(static_cast<int>(buffer))) * row_bytes;
    return (bytes + alignment - 1) / alignment * alignment;
  }
  buffer_rows contiguous(std::byte* data) const { return {{{data, row_bytes_, row_bytes_}, {}}}; }

  bound_plan const* sizes_ = nullptr;
  std::size_t row_bytes_ = 0;
  std::vector<buffer_rows> buffers_;
  std::vector<outgoing> sends_;
  std::vector<incoming> receives_;
};

}  // namespace detail

}  // namespace moe::inline MOE_ABI
