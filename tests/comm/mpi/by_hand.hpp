// All-to-all-v as one writes it with MPI alone: what the executor of plans is compared with.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <cstring>
#include <mpi.h>
#include <support/exchanged_rows.hpp>
#include <vector>

namespace moe_test {

/// One rank's exchange, of rows of M floats and counts that all ranks know.
class exchange_by_hand {
 public:
  exchange_by_hand(counts const& n, int rank, int G, float const* in, float* out)
      : n_(n), r_(rank), R_(static_cast<int>(n.size())), G_(G), in_(in), out_(out) {}

  std::int64_t rows_copied() const { return rows_copied_; }

  void flat() {
    for (int i = 1; i < R_; ++i) receive(out_row(from(i)), n(from(i), r_), from(i));
    for (int i = 1; i < R_; ++i) send(in_row(to(i)), n(r_, to(i)), to(i));
    finish();
    copy(out_row(r_), in_row(r_), n(r_, r_));
  }

  /// Rows for other nodes go to the rank there with the same place first. Rows for this node go straight:
  /// sent with the second hop they would save G - 1 messages, and cost two copies of each row.
  void inter_first() {
    int const N = R_ / G_, a = r_ / G_, g = r_ % G_;
    std::vector<std::vector<float>> arrived(at(N)), packed(at(G_)), staged(at(G_));
    for (int m = 0; m < N; ++m) {
      if (m == a) continue;
      std::int64_t rows = 0, leaving = 0;
      for (int b = 0; b < G_; ++b) {
        rows += n(m * G_ + g, a * G_ + b);
        leaving += n(r_, m * G_ + b);
      }
      arrived[at(m)].resize(static_cast<std::size_t>(rows * M));
      receive(arrived[at(m)].data(), rows, m * G_ + g);
      send(in_row(m * G_), leaving, m * G_ + g);
    }
    for (int b = 0; b < G_; ++b) {
      if (b == g) continue;
      receive(out_row(a * G_ + b), n(a * G_ + b, r_), a * G_ + b);
      send(in_row(a * G_ + b), n(r_, a * G_ + b), a * G_ + b);
    }
    finish();

    auto const part = [&](int m, int b) {  // rows from (m, g) for (a, b)
      float const* first = arrived[at(m)].data();
      for (int c = 0; c < b; ++c) first += n(m * G_ + g, a * G_ + c) * M;
      return first;
    };
    for (int b = 0; b < G_; ++b) {
      if (b == g) continue;
      std::int64_t coming = 0, leaving = 0;
      for (int m = 0; m < N; ++m) {
        if (m == a) continue;
        coming += n(m * G_ + b, r_);
        leaving += n(m * G_ + g, a * G_ + b);
      }
      if (N == 2) {  // one source: nothing to pack
        receive(out_row((1 - a) * G_ + b), coming, a * G_ + b);
        send(part(1 - a, b), leaving, a * G_ + b);
        continue;
      }
      staged[at(b)].resize(static_cast<std::size_t>(coming * M));
      packed[at(b)].resize(static_cast<std::size_t>(leaving * M));
      float* next = packed[at(b)].data();
      for (int m = 0; m < N; ++m)
        if (m != a) next = copy(next, part(m, b), n(m * G_ + g, a * G_ + b));
      receive(staged[at(b)].data(), coming, a * G_ + b);
      send(packed[at(b)].data(), leaving, a * G_ + b);
    }
    finish();
    for (int m = 0; m < N; ++m) {
      if (m != a) copy(out_row(m * G_ + g), part(m, g), n(m * G_ + g, r_));
    }
    copy(out_row(r_), in_row(r_), n(r_, r_));
    for (int b = 0; b < G_ && N > 2; ++b) {
      float const* next = staged[at(b)].data();
      for (int m = 0; m < N && b != g; ++m) {
        if (m == a) continue;
        copy(out_row(m * G_ + b), next, n(m * G_ + b, r_));
        next += n(m * G_ + b, r_) * M;
      }
    }
  }

  /// Rows for place b of any node go to place b of this node first.
  void intra_first() {
    int const N = R_ / G_, a = r_ / G_, g = r_ % G_;
    std::vector<std::vector<float>> packed(at(G_)), arrived(at(G_)), leaving(at(N));
    for (int b = 0; b < G_; ++b) {
      if (b == g) continue;
      std::int64_t sent = 0, received = 0;
      for (int m = 0; m < N; ++m) {
        sent += n(r_, m * G_ + b);
        received += n(a * G_ + b, m * G_ + g);
      }
      packed[at(b)].resize(static_cast<std::size_t>(sent * M));
      arrived[at(b)].resize(static_cast<std::size_t>(received * M));
      float* next = packed[at(b)].data();
      for (int m = 0; m < N; ++m) next = copy(next, in_row(m * G_ + b), n(r_, m * G_ + b));
      receive(arrived[at(b)].data(), received, a * G_ + b);
      send(packed[at(b)].data(), sent, a * G_ + b);
    }
    finish();

    auto const part = [&](int m, int b) {  // rows from (a, b) for (m, g)
      if (b == g) return in_row(m * G_ + g);
      float const* first = arrived[at(b)].data();
      for (int c = 0; c < m; ++c) first += n(a * G_ + b, c * G_ + g) * M;
      return first;
    };
    for (int m = 0; m < N; ++m) {
      if (m == a) continue;
      std::int64_t sent = 0, received = 0;
      for (int b = 0; b < G_; ++b) {
        sent += n(a * G_ + b, m * G_ + g);
        received += n(m * G_ + b, r_);
      }
      leaving[at(m)].resize(static_cast<std::size_t>(sent * M));
      float* next = leaving[at(m)].data();
      for (int b = 0; b < G_; ++b) next = copy(next, part(m, b), n(a * G_ + b, m * G_ + g));
      receive(out_row(m * G_), received, m * G_ + g);
      send(leaving[at(m)].data(), sent, m * G_ + g);
    }
    for (int b = 0; b < G_; ++b) copy(out_row(a * G_ + b), part(a, b), n(a * G_ + b, r_));
    finish();
  }

 private:
  std::int64_t n(int s, int d) const { return n_[at(s)][at(d)]; }
  int to(int i) const { return (r_ + i) % R_; }
  int from(int i) const { return (r_ - i + R_) % R_; }
  float const* in_row(int d) const {
    float const* row = in_;
    for (int i = 0; i < d; ++i) row += n(r_, i) * M;
    return row;
  }
  float* out_row(int s) const {
    float* row = out_;
    for (int i = 0; i < s; ++i) row += n(i, r_) * M;
    return row;
  }
  void send(float const* row, std::int64_t rows, int peer) {
    if (rows == 0) return;
    requests_.push_back(MPI_REQUEST_NULL);
    MPI_Isend(row, static_cast<int>(rows) * M, MPI_FLOAT, peer, 0, MPI_COMM_WORLD,
              &requests_.back());
  }
  void receive(float* row, std::int64_t rows, int peer) {
    if (rows == 0) return;
    requests_.push_back(MPI_REQUEST_NULL);
    MPI_Irecv(row, static_cast<int>(rows) * M, MPI_FLOAT, peer, 0, MPI_COMM_WORLD,
              &requests_.back());
  }
  float* copy(float* to, float const* from, std::int64_t rows) {
    if (rows > 0) std::memcpy(to, from, static_cast<std::size_t>(rows * M) * sizeof(float));
    rows_copied_ += rows;
    return to + rows * M;
  }
  void finish() {
    MPI_Waitall(static_cast<int>(requests_.size()), requests_.data(), MPI_STATUSES_IGNORE);
    requests_.clear();
  }

  counts const& n_;
  int r_, R_, G_;
  float const* in_;
  float* out_;
  std::vector<MPI_Request> requests_;
  std::int64_t rows_copied_ = 0;
};

}  // namespace moe_test
