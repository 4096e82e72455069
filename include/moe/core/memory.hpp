// Memory that the caller owns and the library carves: scratch and saved.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// Bytes that the caller owns, handed out from the front. Does not own them.
///
/// The library allocates nothing in its hot paths. Each function that needs memory has a size
/// function `..._scratch(shape)` and takes a `memory` by value: what it carves is free again when it
/// returns, so one block serves every call that is made one after another.
/// Two kinds use it: *scratch*, dead after the call; *saved*, alive until backward.
class memory {
 public:
  /// What each piece is aligned to: a cache line, and enough for any vector load.
  static constexpr std::size_t alignment = 64;

  constexpr memory() noexcept = default;
  constexpr memory(void* data, std::size_t bytes) noexcept
      : data_(static_cast<std::byte*>(data)), left_(bytes) {}

  /// The next `count` elements, uninitialised, aligned to `alignment`.
  /// @throws precondition_error if there are fewer bytes left.
  template <class T>
  T* take(std::int64_t count, char const* what, call_site site) {
    auto const misaligned = reinterpret_cast<std::uintptr_t>(data_) % alignment;
    std::size_t const skip = misaligned == 0 ? 0 : alignment - misaligned;
    std::size_t const bytes = static_cast<std::size_t>(count) * sizeof(T);
    expects(skip <= left_ && bytes <= left_ - skip, what, site,
            {{"bytes needed", bytes + skip}, {"bytes left", left_}});
    T* const piece = reinterpret_cast<T*>(data_ + skip);
    data_ += skip + bytes;
    left_ -= skip + bytes;
    return piece;
  }

  constexpr std::byte* data() const noexcept { return data_; }
  constexpr std::size_t size() const noexcept { return left_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t left_ = 0;
};

/// Adds up what `memory::take` will need, worst case of alignment included.
class memory_size {
 public:
  template <class T>
  constexpr memory_size& add(std::int64_t count) noexcept {
    bytes_ += static_cast<std::size_t>(count) * sizeof(T) + memory::alignment;
    return *this;
  }
  constexpr std::size_t bytes() const noexcept { return bytes_; }

 private:
  std::size_t bytes_ = 0;
};

/// An owner for callers who have none: aligned bytes, uninitialised, converting to `memory`.
class buffer {
 public:
  buffer() = default;
  explicit buffer(std::size_t bytes)
      : data_(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{memory::alignment}))),
        bytes_(bytes) {}

  operator memory() const noexcept { return {data_.get(), bytes_}; }
  std::byte* data() const noexcept { return data_.get(); }
  std::size_t size() const noexcept { return bytes_; }

 private:
  struct free {
    void operator()(std::byte* data) const noexcept {
      ::operator delete(data, std::align_val_t{memory::alignment});
    }
  };
  std::unique_ptr<std::byte, free> data_;
  std::size_t bytes_ = 0;
};

}  // namespace moe::inline MOE_ABI
