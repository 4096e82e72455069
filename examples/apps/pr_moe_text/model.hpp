// A byte-level transformer language model whose feed-forward parts follow a schedule of experts.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include <moe/moe.hpp>

#include "attention.hpp"
#include "ffn_slot.hpp"

namespace pr_moe_text {

struct model_shape {
  int windows = 0;     // of one step
  std::int64_t S = 0;  // tokens of a window
  std::int64_t M = 0;  // width
  std::int64_t H = 0;  // hidden width of the dense FFN
  int heads = 1;
  moe::expert_schedule schedule;  // one entry per layer
  double capacity_factor = 2;
  double balance_weight = 0.01;
  double longest_gradient = 1;  // it is clipped to this norm
};

/// Sums over the layers of one forward.
struct model_report {
  double loss = 0;  // mean cross-entropy, nats per byte
  std::vector<ffn_report> layers;
};

template <class V>
class model {
 public:
  static constexpr std::int64_t symbols = 256;

  model(moe::cpu const& exec, model_shape const& shape, std::uint64_t seed)
      : model(exec, shape, seed, [&](int l) {
          return make_slot<V>(exec, shape.windows * shape.S, shape.M, shape.H,
                              shape.schedule.experts(l), shape.schedule.has_residual(l),
                              shape.capacity_factor);
        }) {}
  /// @param slot_of  The feed-forward part of a layer, for windows * S tokens.
  template <class SlotOf>
  model(moe::cpu const& exec, model_shape const& shape, std::uint64_t seed, SlotOf const& slot_of)
      : exec_(exec),
        shape_(shape),
        T_(shape.windows * shape.S),
        gemm_(moe::builtin_gemm::scratch_bytes<V>(exec, 1)) {
    std::int64_t const M = shape.M, L = shape.schedule.layers();
    std::int64_t size = 0;
    auto const reserve = [&](std::int64_t count) { return std::exchange(size, size + count); };
    embedding_ = reserve(symbols * M);
    position_ = reserve(shape.S * M);
    for (int l = 0; l < L; ++l) {
      layer one;
      one.slot = slot_of(l);
      one.gain1 = reserve(M);
      one.qkv = reserve(3 * M * M);
      one.mix = reserve(M * M);
      one.gain2 = reserve(M);
      one.x = make(M);
      one.normed1 = make(M);
      one.projected = make(3 * M);
      one.p = std::vector<V>(static_cast<std::size_t>(T_ * shape.heads * shape.S));
      one.mixed = make(M);
      one.middle = make(M);
      one.normed2 = make(M);
      layers_.push_back(std::move(one));
    }
    final_gain_ = reserve(M);
    head_ = reserve(M * symbols);
    own_ = size;  // first, so that they have the same places whatever the slots hold
    for (layer& l : layers_) l.ffn = reserve(l.slot->parameter_elements());
    values_.assign(static_cast<std::size_t>(size), V(0));
    gradients_.assign(values_.size(), V(0));
    first_.assign(values_.size(), V(0));
    second_.assign(values_.size(), V(0));
    last_ = make(M);
    normed_ = make(M);
    logits_ = make(symbols);
    stream_ = make(M);
    dstream_ = make(M);
    dother_ = make(M);
    dwide_ = make(3 * M);
    start(seed);
  }

  std::int64_t parameters() const { return static_cast<std::int64_t>(values_.size()); }
  std::vector<V>& values() { return values_; }
  std::vector<V> const& gradients() const { return gradients_; }
  moe::matrix_view<V const> logits() const { return {logits_.data(), T_, symbols}; }

  /// The mean cross-entropy of `target` given `input`, [windows, S] each; of fewer windows, too.
  model_report forward(std::vector<std::uint8_t> const& input,
                       std::vector<std::uint8_t> const& target, moe::batch const& ids) {
    std::int64_t const M = shape_.M;
    T_ = static_cast<std::int64_t>(input.size());
    moe::matrix_view<V> const x(stream_.data(), T_, M);
    exec_.split(T_, 64, [&](std::int64_t first, std::int64_t last, int) {
      for (std::int64_t t = first; t < last; ++t)
        for (std::int64_t m = 0; m < M; ++m)
          x(t, m) = at(embedding_)[input[static_cast<std::size_t>(t)] * M + m] +
                    at(position_)[t % shape_.S * M + m];
    });
    model_report report;
    for (layer& l : layers_) {
      l.x = stream_;
      rms_norm<V>::forward(exec_, view(l.x, M), at(l.gain1), view(l.normed1, M));
      multiply(view(l.normed1, M), matrix(l.qkv, M, 3 * M), view(l.projected, 3 * M));
      heads().forward(exec_, view(l.projected, 3 * M), {l.p.data(), T_ * shape_.heads, shape_.S},
                      view(l.mixed, M), rooms_);
      multiply(view(l.mixed, M), matrix(l.mix, M, M), view(dother_, M));
      add(stream_, dother_);
      l.middle = stream_;
      rms_norm<V>::forward(exec_, view(l.middle, M), at(l.gain2), view(l.normed2, M));
      report.layers.push_back(l.slot->forward(exec_, view(l.normed2, M), ids, view(dother_, M)));
      add(stream_, dother_);
    }
    last_ = stream_;
    rms_norm<V>::forward(exec_, view(last_, M), at(final_gain_), view(normed_, M));
    multiply(view(normed_, M), matrix(head_, M, symbols), view(logits_, symbols));
    report.loss = cross_entropy(target);
    return report;
  }

  /// Gradients of the loss and of the balance losses; after a forward with the same input and target.
  void backward(std::vector<std::uint8_t> const& input, std::vector<std::uint8_t> const& target) {
    std::int64_t const M = shape_.M;
    exec_.split(T_, 64, [&](std::int64_t first, std::int64_t last, int) {
      for (std::int64_t t = first; t < last; ++t) {
        V* const p = logits_.data() + t * symbols;  // probabilities since the forward
        p[target[static_cast<std::size_t>(t)]] -= V(1);
        for (std::int64_t s = 0; s < symbols; ++s) p[s] /= V(T_);
      }
    });
    std::fill(gradients_.begin(), gradients_.end(), V(0));
    multiply_backward(view(normed_, M), matrix(head_, M, symbols), view(logits_, symbols),
                      view(dother_, M), gradient(head_, M, symbols));
    std::fill(dstream_.begin(), dstream_.end(), V(0));
    rms_norm<V>::backward(exec_, view(last_, M), at(final_gain_), view(dother_, M),
                          view(dstream_, M), grad(final_gain_), rooms_);
    for (std::size_t i = layers_.size(); i-- > 0;) {
      layer& l = layers_[i];
      l.slot->backward(exec_, view(l.normed2, M), view(dstream_, M), shape_.balance_weight,
                       view(dother_, M));
      rms_norm<V>::backward(exec_, view(l.middle, M), at(l.gain2), view(dother_, M),
                            view(dstream_, M), grad(l.gain2), rooms_);
      multiply_backward(view(l.mixed, M), matrix(l.mix, M, M), view(dstream_, M), view(dother_, M),
                        gradient(l.mix, M, M));
      heads().backward(exec_, view(l.projected, 3 * M), {l.p.data(), T_ * shape_.heads, shape_.S},
                       view(dother_, M), view(dwide_, 3 * M), rooms_);
      multiply_backward(view(l.normed1, M), matrix(l.qkv, M, 3 * M), view(dwide_, 3 * M),
                        view(dother_, M), gradient(l.qkv, M, 3 * M));
      rms_norm<V>::backward(exec_, view(l.x, M), at(l.gain1), view(dother_, M), view(dstream_, M),
                            grad(l.gain1), rooms_);
    }
    for (std::int64_t t = 0; t < T_; ++t)
      for (std::int64_t m = 0; m < M; ++m) {
        V const d = dstream_[static_cast<std::size_t>(t * M + m)];
        grad(embedding_)[input[static_cast<std::size_t>(t)] * M + m] += d;
        grad(position_)[t % shape_.S * M + m] += d;
      }
  }

  /// Those of all parameters that are not a slot's.
  moe::vector_view<V> own_gradients() { return {gradients_.data(), own_}; }

  /// Adam with decoupled weight decay; the gradient is clipped.
  void step(double rate, int number) {
    double squares = 0;
    for (V g : gradients_) squares += static_cast<double>(g) * static_cast<double>(g);
    V const clip = V(1 / std::max(1.0, std::sqrt(squares) / shape_.longest_gradient));
    V const b1 = V(0.9), b2 = V(0.95), decay = V(1 - rate * 0.01);
    V const correct1 = V(1 / (1 - std::pow(0.9, number))),
            correct2 = V(1 / (1 - std::pow(0.95, number)));
    exec_.split(parameters(), 4096, [&](std::int64_t first, std::int64_t last, int) {
      for (auto i = static_cast<std::size_t>(first); i < static_cast<std::size_t>(last); ++i) {
        V const g = gradients_[i] * clip;
        first_[i] = b1 * first_[i] + (V(1) - b1) * g;
        second_[i] = b2 * second_[i] + (V(1) - b2) * g * g;
        values_[i] = values_[i] * decay -
                     V(rate) * first_[i] * correct1 / (std::sqrt(second_[i] * correct2) + V(1e-8));
      }
    });
  }

 private:
  struct layer {
    std::unique_ptr<ffn_slot<V>> slot;
    std::int64_t gain1 = 0, qkv = 0, mix = 0, gain2 = 0,
                 ffn = 0;  // offsets in the arrays of parameters
    std::vector<V> x, normed1, projected, p, mixed, middle, normed2;
  };

  std::vector<V> make(std::int64_t width) const {
    return std::vector<V>(static_cast<std::size_t>(T_ * width));
  }
  moe::matrix_view<V> view(std::vector<V>& data, std::int64_t width) const {
    return {data.data(), T_, width};
  }
  V* at(std::int64_t offset) { return values_.data() + offset; }
  V* grad(std::int64_t offset) { return gradients_.data() + offset; }
  moe::stacked_view<V const> matrix(std::int64_t offset, std::int64_t in, std::int64_t out) {
    return {at(offset), 1, in, out};
  }
  moe::stacked_view<V> gradient(std::int64_t offset, std::int64_t in, std::int64_t out) {
    return {grad(offset), 1, in, out};
  }
  attention<V> heads() const { return {shape_.S, shape_.heads, shape_.M / shape_.heads}; }

  void multiply(moe::matrix_view<V const> a, moe::stacked_view<V const> b, moe::matrix_view<V> c) {
    moe::builtin_gemm::forward<V>(exec_, a, b, {}, moe::all_rows(T_), c, gemm_);
  }
  void multiply_backward(moe::matrix_view<V const> a, moe::stacked_view<V const> b,
                         moe::matrix_view<V const> dc, moe::matrix_view<V> da,
                         moe::stacked_view<V> db) {
    moe::all_rows const all(T_);
    moe::builtin_gemm::weight_gradient<V>(exec_, a, dc, all, moe::update::assign, db, gemm_);
    moe::builtin_gemm::input_gradient<V>(exec_, dc, b, all, moe::update::assign, da, gemm_);
  }
  void add(std::vector<V>& to, std::vector<V> const& from) {
    exec_.split(static_cast<std::int64_t>(to.size()), 4096,
                [&](std::int64_t first, std::int64_t last, int) {
                  for (auto i = static_cast<std::size_t>(first); i < static_cast<std::size_t>(last);
                       ++i)
                    to[i] += from[i];
                });
  }

  /// Turns the logits into probabilities.
  double cross_entropy(std::vector<std::uint8_t> const& target) {
    std::vector<double>& losses = losses_;
    losses.assign(static_cast<std::size_t>(T_), 0);
    exec_.split(T_, 64, [&](std::int64_t first, std::int64_t last, int) {
      for (std::int64_t t = first; t < last; ++t) {
        V* const l = logits_.data() + t * symbols;
        V const highest = *std::max_element(l, l + symbols);
        for (std::int64_t s = 0; s < symbols; ++s) l[s] = moe::exp(l[s] - highest);
        double total = 0;
        for (std::int64_t s = 0; s < symbols; ++s) total += static_cast<double>(l[s]);
        for (std::int64_t s = 0; s < symbols; ++s) l[s] /= V(total);
        auto const i = static_cast<std::size_t>(t);
        losses[i] = -std::log(std::max(1e-30, static_cast<double>(l[target[i]])));
      }
    });
    double sum = 0;
    for (double one : losses) sum += one;
    return sum / static_cast<double>(T_);
  }

  void start(std::uint64_t seed) {
    auto const normal = [&](std::int64_t offset, std::int64_t count, double std) {
      for (std::int64_t i = 0; i < count; ++i)
        at(offset)[i] = V(std * static_cast<double>(moe::normal({.id = offset + i, .seed = seed},
                                                                moe::stream::user, 0)));
    };
    std::int64_t const M = shape_.M;
    auto const scale = 1 / std::sqrt(static_cast<double>(M));
    auto const L = static_cast<double>(layers_.size());
    normal(embedding_, symbols * M, 0.1);
    normal(position_, shape_.S * M, 0.02);
    normal(head_, M * symbols, 0.5 * scale);
    std::fill_n(at(final_gain_), M, V(1));
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      std::fill_n(at(layers_[l].gain1), M, V(1));
      std::fill_n(at(layers_[l].gain2), M, V(1));
      normal(layers_[l].qkv, 3 * M * M, scale);
      normal(layers_[l].mix, M * M, scale / std::sqrt(2 * L));
      layers_[l].slot->bind(exec_, at(layers_[l].ffn), grad(layers_[l].ffn), seed,
                            static_cast<int>(l));
    }
  }

  moe::cpu exec_;
  model_shape shape_;
  std::int64_t T_;  // tokens of the last forward
  moe::buffer gemm_;
  std::int64_t embedding_, position_, final_gain_, head_, own_;
  std::vector<layer> layers_;
  std::vector<V> values_, gradients_, first_, second_;
  std::vector<V> last_, normed_, logits_, stream_, dstream_, dother_, dwide_, rooms_;
  std::vector<double> losses_;
};

}  // namespace pr_moe_text
