// Parameters, floating-point operations and bytes of a transformer with a given expert schedule.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/schedule/pyramid.hpp>

namespace moe::inline MOE_ABI {

/// What accounting must know of a decoder-only transformer besides its schedule, which has the layers.
/// The defaults are GPT's: FFN of 4M, learned positions, biases, head tied to the token embedding.
struct transformer_shape {
  int M = 0;              ///< Model width (h in the DeepSpeed papers).
  int H = 0;              ///< Hidden width of a dense FFN; 0 = 4M.
  int expert_H = 0;       ///< Of one expert; 0 = H.
  int residual_H = 0;     ///< Of the fixed MLP beside the experts; 0 = expert_H.
  int attention_M = 0;    ///< Query heads * head size; 0 = M.
  int vocabulary = 0;     ///< Rows of the token embedding; 0 leaves embedding and head out.
  int positions = 0;      ///< Learned position embeddings; 0 = none (rotary).
  bool tied_head = true;  ///< The output head is the token embedding, transposed.
  bool glu = false;       ///< FFNs have a gate projection: 3 matrices, not 2.
  bool biases = true;     ///< Of projections, FFNs and norms. Routers have none.
  /// Of one layer, biases included; 0 = 4 M attention_M, + 3 attention_M + M with biases.
  std::int64_t attention_parameters = 0;
};

/// Parameters by part. One count is of what is stored, or of what one token uses.
struct parameter_count {
  std::int64_t attention = 0;
  std::int64_t norms = 0;      ///< Two in each layer and one at the end.
  std::int64_t dense_ffn = 0;  ///< FFNs of the dense layers.
  std::int64_t residual = 0;   ///< Fixed MLPs beside experts.
  std::int64_t router = 0;
  std::int64_t experts = 0;
  std::int64_t embedding = 0;  ///< Tokens, positions and an untied head.

  constexpr std::int64_t ffn() const noexcept { return dense_ffn + residual + router + experts; }
  constexpr std::int64_t without_embedding() const noexcept { return attention + norms + ffn(); }
  constexpr std::int64_t total() const noexcept { return without_embedding() + embedding; }

  friend constexpr bool operator==(parameter_count const&, parameter_count const&) = default;
};

/// Floating-point operations by part; a multiplication and an addition count as 2.
struct flop_count {
  std::int64_t attention_projections = 0;
  std::int64_t attention_scores = 0;  ///< Queries times keys, and scores times values.
  std::int64_t dense_ffn = 0;
  std::int64_t residual = 0;
  std::int64_t router = 0;
  std::int64_t experts = 0;
  std::int64_t head = 0;  ///< Logits over the vocabulary.

  constexpr std::int64_t ffn() const noexcept { return dense_ffn + residual + router + experts; }
  constexpr std::int64_t total() const noexcept {
    return attention_projections + attention_scores + ffn() + head;
  }
};

/// What the backward pass computes again instead of reading it from saved memory.
enum class recompute {
  none,
  ffn,   ///< Inside FFNs and experts: only their inputs are saved.
  layer  ///< Everything: only the input of each layer is saved.
};

namespace detail {

/// A transformer_shape with its defaults filled in, and checked.
class sizes {
 public:
  constexpr sizes(transformer_shape const& shape, expert_schedule const& schedule, call_site site)
      : shape_(shape) {
    expects(shape.M >= 1 && shape.H >= 0 && shape.expert_H >= 0 && shape.residual_H >= 0 &&
                shape.attention_M >= 0 && shape.vocabulary >= 0 && shape.positions >= 0 &&
                shape.attention_parameters >= 0,
            "transformer_shape: M >= 1, no size negative", site,
            {{"M", shape.M},
             {"H", shape.H},
             {"expert_H", shape.expert_H},
             {"residual_H", shape.residual_H},
             {"attention_M", shape.attention_M},
             {"vocabulary", shape.vocabulary},
             {"positions", shape.positions},
             {"attention_parameters", shape.attention_parameters}});
    H_ = shape.H > 0 ? shape.H : 4 * std::int64_t{shape.M};
    expert_H_ = shape.expert_H > 0 ? shape.expert_H : H_;
    residual_H_ = shape.residual_H > 0 ? shape.residual_H : expert_H_;
    attention_M_ = shape.attention_M > 0 ? shape.attention_M : M();
    // In floating point, so that the check itself cannot overflow. More than any count below.
    auto const width = static_cast<double>(H_ + expert_H_ + residual_H_ + attention_M_ + M() + 1);
    double const largest =
        (4 * width * static_cast<double>(M() + 1) +
         static_cast<double>(shape.attention_parameters)) *
            (schedule.max_experts() + 4.0) * (schedule.layers() + 1.0) +
        2.0 * static_cast<double>(M()) * (static_cast<double>(shape.vocabulary) + shape.positions);
    expects(largest < 0x1p56, "transformer_shape: fewer than 2^56 parameters", site,
            {{"at most", largest}});
  }

  constexpr std::int64_t M() const noexcept { return shape_.M; }
  constexpr std::int64_t H() const noexcept { return H_; }
  constexpr std::int64_t expert_H() const noexcept { return expert_H_; }
  constexpr std::int64_t residual_H() const noexcept { return residual_H_; }
  constexpr std::int64_t attention_M() const noexcept { return attention_M_; }

  /// Of one FFN of hidden width H.
  constexpr std::int64_t ffn_weights(std::int64_t H) const noexcept {
    return (shape_.glu ? 3 : 2) * M() * H;
  }
  constexpr std::int64_t ffn_parameters(std::int64_t H) const noexcept {
    return ffn_weights(H) + (shape_.biases ? (shape_.glu ? 2 : 1) * H + M() : 0);
  }
  constexpr std::int64_t attention_weights() const noexcept {
    return shape_.attention_parameters > 0 ? shape_.attention_parameters : 4 * M() * attention_M_;
  }
  constexpr std::int64_t attention_parameters() const noexcept {
    bool const known = shape_.attention_parameters > 0;
    return attention_weights() + (!known && shape_.biases ? 3 * attention_M_ + M() : 0);
  }
  constexpr std::int64_t norm_parameters() const noexcept { return (shape_.biases ? 2 : 1) * M(); }
  constexpr std::int64_t embedding_parameters() const noexcept {
    return M() * ((shape_.tied_head ? 1 : 2) * std::int64_t{shape_.vocabulary} + shape_.positions);
  }

 private:
  transformer_shape shape_;
  std::int64_t H_ = 0, expert_H_ = 0, residual_H_ = 0, attention_M_ = 0;
};

/// Everything but experts: the same in total as per token.
constexpr parameter_count common_parameters(sizes const& size, expert_schedule const& schedule) {
  parameter_count count{.norms = size.norm_parameters(), .embedding = size.embedding_parameters()};
  for (int l = 0; l < schedule.layers(); ++l) {
    count.attention += size.attention_parameters();
    count.norms += 2 * size.norm_parameters();
    count.router += size.M() * schedule.experts(l);
    if (!schedule.is_moe(l)) count.dense_ffn += size.ffn_parameters(size.H());
    if (schedule.has_residual(l)) count.residual += size.ffn_parameters(size.residual_H());
  }
  return count;
}

}  // namespace detail

/// Parameters that are stored. With M the width, H the hidden width, V words, S positions:
///
///   FFN, expert  2MH + H + M      GLU: 3MH + 2H + M      without biases: 2MH, 3MH
///   attention    4M^2 + 4M        norm  2M               without biases: 4M^2, M
///   router       M E              embedding  M (V + S)   untied head: M (2V + S)
///
/// An MoE layer has E experts in place of the FFN, and its residual MLP; a pool is stored once, a
/// router by every layer. With GPT's defaults an FFN or expert has 8M^2 + 5M.
/// The learned mix of a residual layer (2M + 2, in DeepSpeed's code, not in the paper) is left out.
/// @throws precondition_error unless sizes are sensible and all counts fit; so do the rest.
/// @cost O(layers^2) with shared pools, else O(layers); no allocation; constexpr.
constexpr parameter_count total_parameters(transformer_shape const& shape,
                                           expert_schedule const& schedule,
                                           call_site site = call_site::here()) {
  detail::sizes const size(shape, schedule, site);
  parameter_count count = detail::common_parameters(size, schedule);
  std::int64_t const one_expert = size.ffn_parameters(size.expert_H());
  count.experts = schedule.total_experts() * one_expert;
  return count;
}

/// Parameters that take part in the forward pass of one token: all but the experts it did not choose
/// (the whole embedding is counted, as is usual when sizes are quoted). Experts count in every layer
/// that uses them, so that a shared pool changes nothing here.
constexpr parameter_count active_parameters_per_token(transformer_shape const& shape,
                                                      expert_schedule const& schedule,
                                                      call_site site = call_site::here()) {
  detail::sizes const size(shape, schedule, site);
  parameter_count count = detail::common_parameters(size, schedule);
  for (int l = 0; l < schedule.layers(); ++l) {
    count.experts += schedule.k(l) * size.ffn_parameters(size.expert_H());
  }
  return count;
}

/// Active over total parameters, embedding left out. Above 1 is possible with shared pools.
/// When every layer has E experts of width D_e, k of them active, and a fixed MLP of width D_s, all
/// GLU without biases, it is close to (4 + 3b) / (4 + 3m), b = (D_s + k D_e) / M, m = (D_s + E D_e) / M
/// (arXiv 2506.12119); this counts norms and routers, too.
constexpr double activation_rate(transformer_shape const& shape, expert_schedule const& schedule,
                                 call_site site = call_site::here()) {
  auto const active = active_parameters_per_token(shape, schedule, site).without_embedding();
  auto const total = total_parameters(shape, schedule, site).without_embedding();
  return static_cast<double>(active) / static_cast<double>(total);
}

/// Operations of one token's forward pass: 2 for each weight of a matrix that it meets, and
/// 4 context attention_M in each layer for the attention itself. Biases, norms and activations are
/// left out. Where `attention_parameters` is given, all of them count as matrix weights.
///
/// @param context_tokens  Keys a token attends to: the causal mean over S tokens is (S + 1) / 2.
constexpr flop_count forward_flops_per_token(transformer_shape const& shape,
                                             expert_schedule const& schedule,
                                             std::int64_t context_tokens,
                                             call_site site = call_site::here()) {
  detail::sizes const size(shape, schedule, site);
  expects(
      context_tokens >= 0 &&
          static_cast<double>(context_tokens) * static_cast<double>(size.attention_M()) < 0x1p46,
      "forward_flops_per_token: 0 <= context_tokens, context_tokens * attention_M < 2^46", site,
      {{"context_tokens", context_tokens}, {"attention_M", size.attention_M()}});
  flop_count count{.head = 2 * size.M() * shape.vocabulary};
  for (int l = 0; l < schedule.layers(); ++l) {
    count.attention_projections += 2 * size.attention_weights();
    count.attention_scores += 4 * context_tokens * size.attention_M();
    count.router += 2 * size.M() * schedule.experts(l);
    count.experts += 2 * schedule.k(l) * size.ffn_weights(size.expert_H());
    if (!schedule.is_moe(l)) count.dense_ffn += 2 * size.ffn_weights(size.H());
    if (schedule.has_residual(l)) count.residual += 2 * size.ffn_weights(size.residual_H());
  }
  return count;
}

/// Operations of one token's backward pass over those of its forward pass, without recomputation: a
/// matrix product has two gradients.
inline constexpr int backward_flops_per_forward_flop = 2;

/// Operations of one token's forward and backward pass: 3 times the forward ones, + what is
/// recomputed: the FFNs (routers are not), or everything but the head.
constexpr std::int64_t training_flops_per_token(flop_count const& forward,
                                                recompute again = recompute::none) noexcept {
  std::int64_t const recomputed = again == recompute::none  ? 0
                                  : again == recompute::ffn ? forward.ffn() - forward.router
                                                            : forward.total() - forward.head;
  return (1 + backward_flops_per_forward_flop) * forward.total() + recomputed;
}

/// Bytes of so many parameters: of all stored ones, or of those that one token makes the memory read.
/// @param bytes_per_parameter  2 for bf16; 16 in training with a float master copy, Adam's two
///                             moments, bf16 weights and gradients.
/// @pre 0 <= bytes_per_parameter <= 64.
constexpr std::int64_t weight_bytes(parameter_count const& count, int bytes_per_parameter,
                                    call_site site = call_site::here()) {
  expects(bytes_per_parameter >= 0 && bytes_per_parameter <= 64,
          "weight_bytes: 0 <= bytes_per_parameter <= 64", site,
          {{"bytes_per_parameter", bytes_per_parameter}});
  return count.total() * bytes_per_parameter;
}

/// Elements that one token's forward pass saves for its backward pass, times their size. Per layer:
///
///   attention  2M + 4A     layer input, normalised input; queries, keys, values; output (A =
///                          attention_M; scores are not saved, keys and values as many as queries)
///   any FFN    2M + nH     FFN input, normalised input; n = 2: hidden before and after the
///                          activation, n = 3 with GLU
///   experts    K (2M + n expert_H)  each choice's row, hidden values and output
///   residual   n residual_H
///
/// An MoE layer has the 2M of "any FFN" once. recompute::ffn drops all hidden values and the experts'
/// rows and outputs; recompute::layer leaves M. Router, table, embedding and loss are left out.
/// This is a model of a training step, for comparing schedules; what a part of this library really
/// saves is told by its own size function.
constexpr std::int64_t saved_bytes_per_token(transformer_shape const& shape,
                                             expert_schedule const& schedule, int bytes_per_element,
                                             recompute again = recompute::none,
                                             call_site site = call_site::here()) {
  detail::sizes const size(shape, schedule, site);
  expects(bytes_per_element >= 0 && bytes_per_element <= 16,
          "saved_bytes_per_token: 0 <= bytes_per_element <= 16", site,
          {{"bytes_per_element", bytes_per_element}});
  std::int64_t const n = shape.glu ? 3 : 2;
  std::int64_t elements = 0;
  for (int l = 0; l < schedule.layers(); ++l) {
    if (again == recompute::layer) {
      elements += size.M();
      continue;
    }
    elements += 4 * size.M() + 4 * size.attention_M();
    if (again == recompute::ffn) continue;
    elements += schedule.k(l) * (2 * size.M() + n * size.expert_H());
    if (!schedule.is_moe(l)) elements += n * size.H();
    if (schedule.has_residual(l)) elements += n * size.residual_H();
  }
  return elements * bytes_per_element;
}

}  // namespace moe::inline MOE_ABI
