// Memory that the caller owns and the library carves: scratch and saved.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>

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
  /// Of a null pointer there are no bytes.
  constexpr memory(void* data, std::size_t bytes) noexcept
      : data_(static_cast<std::byte*>(data)), left_(data == nullptr ? 0 : bytes) {}

  /// The next `count` elements, uninitialised, aligned to `alignment`; of 0 elements, any pointer.
  /// @param what  Function and rule of the caller: "build_table: scratch >= build_table_scratch(...)".
  /// @throws precondition_error if there are fewer bytes left, or count < 0.
  template <class T>
  T* take(std::int64_t count, char const* what, call_site site) {
    static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= alignment);
    constexpr auto most = std::numeric_limits<std::int64_t>::max() / (2 * std::int64_t{sizeof(T)});
    expects(count >= 0 && count <= most, what, site, {{"elements", count}});
    if (count == 0) return reinterpret_cast<T*>(data_);
    auto const misaligned = reinterpret_cast<std::uintptr_t>(data_) % alignment;
    std::size_t const skip = misaligned == 0 ? 0 : alignment - misaligned;
    std::size_t const bytes = skip + static_cast<std::size_t>(count) * sizeof(T);
    expects(bytes <= left_, what, site, {{"bytes needed", bytes}, {"bytes left", left_}});
    T* const piece = reinterpret_cast<T*>(data_ + skip);
    data_ += bytes;
    left_ -= bytes;
    return piece;
  }

  constexpr std::byte* data() const noexcept { return data_; }
  constexpr std::size_t size() const noexcept { return left_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t left_ = 0;
};

/// Adds up what `memory::take` will need, worst case of alignment included: one `add` for each take.
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
  constexpr buffer() noexcept = default;
  explicit buffer(std::size_t bytes)
      : data_(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{memory::alignment}))),
        bytes_(bytes) {}
  buffer(buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  buffer& operator=(buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~buffer() { ::operator delete(data_, std::align_val_t{memory::alignment}); }

  operator memory() const noexcept { return {data_, bytes_}; }
  std::byte* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace moe::inline MOE_ABI
