// The laws of the concepts as test templates: each runs on every model of its concept.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <doctest/doctest.h>
#include <initializer_list>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <moe/core/concepts.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>

namespace moe_test {

/// An array_row that owns its scores and exactly the room that `copies` copies need.
template <class V>
class owned_row {
 public:
  owned_row(std::vector<V> scores, int copies)
      : scores_(std::move(scores)),
        storage_(scores_.size() * static_cast<std::size_t>(copies)),
        room_{storage_.data(), copies},
        row_(scores_.data(), static_cast<int>(scores_.size()), &room_) {}
  owned_row(owned_row const&) = delete;
  owned_row& operator=(owned_row const&) = delete;

  moe::array_row<V>& row() { return row_; }
  std::vector<V> const& scores() const { return scores_; }

 private:
  std::vector<V> scores_;
  std::vector<V> storage_;
  moe::row_room<V> room_;
  moe::array_row<V> row_;
};

/// How `score_row_laws` makes an array_row; a law for another row type passes its own.
struct on_array {
  /// Calls f(row) on a row of these scores with room for `copies` copies.
  template <class V, class F>
  void operator()(std::vector<V> const& scores, int copies, F&& f) const {
    owned_row<V> owned(scores, copies);
    f(owned.row());
  }
};

/// P::copies, or `otherwise` where P declares none.
template <class P>
constexpr int copies_of(int otherwise) {
  if constexpr (requires { P::copies; })
    return static_cast<int>(P::copies);
  else
    return otherwise;
}

/// Row lengths around the widths of lanes, and some of production routers.
inline constexpr int law_sizes[] = {1, 2, 3, 4, 7, 8, 31, 32, 33, 60, 64, 65, 160};

/// [E] normal numbers; each is -inf with the given probability.
template <class V>
std::vector<V> law_scores(int E, unsigned seed, double missing = 0, double mean = 0,
                          double sd = 1) {
  std::mt19937 bits(seed * 977u + static_cast<unsigned>(E));
  std::normal_distribution<double> normal(mean, sd);
  std::uniform_real_distribution<double> unit(0, 1);
  std::vector<V> scores(static_cast<std::size_t>(E));
  for (V& s : scores) {
    s = static_cast<V>(normal(bits));
    if (unit(bits) < missing) s = moe::no_score<V>;
  }
  return scores;
}

template <class To, class From>
std::vector<To> law_cast(std::vector<From> const& from) {
  std::vector<To> to;
  for (From v : from) to.push_back(static_cast<To>(v));
  return to;
}

/// |a - b| within `relative` of the greater, or of 1 if both are small.
inline bool law_close(double a, double b, double relative) {
  return std::abs(a - b) <= relative * std::max({1.0, std::abs(a), std::abs(b)});
}

/// The same bits, but for the sign and payload of a NaN.
template <class V>
bool law_same(V a, V b) {
  return (a == b && std::signbit(a) == std::signbit(b)) || (a != a && b != b);
}

// --------------------------------------------------------------------------------------------------

/// The sum that a score_row has to give: lane l of 32 adds elements l, l + 32, ... in turn, and the
/// lanes are added as a butterfly. Written for a machine of `width` lanes, each of which keeps
/// 32 / width partial sums: any width gives the same bits.
template <class V, class F>
V law_sum(std::vector<V> const& scores, F const& f, int width) {
  int const E = static_cast<int>(scores.size());
  int const kept = 32 / width;
  // partial[thread][j] is lane j * width + thread.
  std::vector<std::vector<V>> partial(static_cast<std::size_t>(width),
                                      std::vector<V>(static_cast<std::size_t>(kept), V(0)));
  for (int thread = 0; thread < width; ++thread)
    for (int e = thread; e < E; e += width) {
      V& sum =
          partial[static_cast<std::size_t>(thread)][static_cast<std::size_t>(e / width % kept)];
      sum = sum + f(e, scores[static_cast<std::size_t>(e)]);
    }
  for (int distance = 16; distance > 0; distance /= 2) {
    auto const before = partial;
    for (int lane = 0; lane < 32; ++lane) {
      int const other = lane ^ distance;
      auto const at = [width](auto& p, int l) -> auto& {
        return p[static_cast<std::size_t>(l % width)][static_cast<std::size_t>(l / width)];
      };
      at(partial, lane) = at(before, lane) + at(before, other);
    }
  }
  return partial[0][0];
}

/// Laws of a score_row. `make(scores, copies, f)` calls f(row) on a row of R, maybe in many threads:
/// what f captures is constant.
template <class R, class Make>
  requires moe::score_row<R>
void score_row_laws(Make const& make,
                    std::vector<int> const& sizes = {std::begin(law_sizes), std::end(law_sizes)}) {
  using V = typename R::value_type;
  V const none = -std::numeric_limits<V>::infinity();
  auto const index = [](int e) { return static_cast<std::size_t>(e); };

  for (int const E : sizes) {
    CAPTURE(E);
    auto const scores = law_scores<V>(E, 1, 0.2);
    auto const others = law_scores<V>(E, 2);

    make(scores, 1, [&](R& row) {  // size, at, add
      REQUIRE(row.size() == E);
      for (int e = 0; e < E; ++e) CHECK(row.at(e) == scores[index(e)]);
      row.add(E - 1, V(2));
      CHECK(row.at(E - 1) == scores[index(E - 1)] + V(2));
      if (E > 1) CHECK(row.at(0) == scores[0]);
    });

    make(scores, 0, [&](R& row) {  // transform knows the index and the score, once each
      row.transform([](int e, V s) { return static_cast<V>(e) + V(2) * s; });
      for (int e = 0; e < E; ++e) CHECK(row.at(e) == static_cast<V>(e) + V(2) * scores[index(e)]);
    });

    make(scores, 0, [&](R& row) {  // transform and sum by two rows
      make(others, 0, [&](R& other) {
        V const sum = row.sum(other, [](int e, V s, V o) {
          return (s > -std::numeric_limits<V>::infinity() ? s : V(0)) + static_cast<V>(e) * o;
        });
        double expected = 0, magnitude = 1;
        for (int e = 0; e < E; ++e) {
          V const s = scores[index(e)];
          double const part = (s > none ? double(s) : 0.0) + e * double(others[index(e)]);
          expected += part;
          magnitude += std::abs(part);
        }
        CHECK(std::abs(double(sum) - expected) <=
              magnitude * E * double(std::numeric_limits<V>::epsilon()));
        row.transform(other, [](int e, V s, V o) { return s + static_cast<V>(e) * o; });
        for (int e = 0; e < E; ++e) {
          CHECK(row.at(e) == scores[index(e)] + static_cast<V>(e) * others[index(e)]);
          CHECK(other.at(e) == others[index(e)]);
        }
      });
    });

    make(others, 0, [&](R& row) {  // the order of sums is fixed by E alone
      auto const f = [](int e, V s) { return s * static_cast<V>(1 + e % 3); };
      V const sum = row.sum(f);
      CHECK(sum == law_sum(others, f, 1));
      CHECK(sum == law_sum(others, f, 8));
      CHECK(sum == law_sum(others, f, 32));
      make(scores, 0, [&](R& other) {
        auto const keep_first = [&f](int e, V s, V) { return f(e, s); };
        CHECK(row.sum(other, keep_first) == sum);
      });
    });

    make(scores, 0, [&](R& row) {  // max over ranges
      for (int const first : {0, E / 3, E})
        for (int const last : {first, first + (E - first) / 2, E}) {
          V expected = none;
          for (int e = first; e < last; ++e) expected = std::max(expected, scores[index(e)]);
          CHECK(row.max(first, last) == expected);
        }
      for (int e = 0; e < E; ++e) CHECK(row.at(e) == scores[index(e)]);
    });

    make(scores, 2, [&](R& row) {  // copies are independent of the row and of each other
      R a = row.copy();
      R b = a.copy();
      a.transform([](int, V) { return V(7); });
      b.add(0, V(1));
      for (int e = 0; e < E; ++e) {
        CHECK(row.at(e) == scores[index(e)]);
        CHECK(a.at(e) == V(7));
        CHECK(b.at(e) == scores[index(e)] + (e == 0 ? V(1) : V(0)));
      }
      row.transform([](int, V) { return V(3); });
      CHECK(a.at(E - 1) == V(7));
    });

    // pop_max gives a stable sort: falling scores, ties by rising id, -inf never. Few different
    // values make many ties.
    auto tied = scores;
    for (V& s : tied) s = s > none ? std::round(s) : s;
    int const first = E / 4;
    std::vector<int> order;
    for (int e = first; e < E; ++e)
      if (tied[index(e)] > none) order.push_back(e);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return tied[index(a)] > tied[index(b)]; });
    make(tied, 0, [&](R& row) {
      for (int const e : order) {
        auto const best = row.pop_max(first, E);
        REQUIRE(best.expert == e);
        CHECK(best.key == tied[index(e)]);
        CHECK(row.at(e) == none);
      }
      CHECK(row.pop_max(first, E).expert == -1);
      CHECK(row.pop_max(first, first).expert == -1);
      for (int e = 0; e < first; ++e) CHECK(row.at(e) == tied[index(e)]);
    });
  }
}

// --------------------------------------------------------------------------------------------------

/// What the laws of a policy may assume of it.
struct law_options {
  moe::token token{.id = 5, .row = 3, .seed = 11, .step = 2, .training = false};
  std::vector<int> sizes{std::begin(law_sizes), std::end(law_sizes)};  ///< E to try.
  double mean = 0;         ///< Of the random scores or logits,
  double sd = 1;           ///< and their spread.
  double forward = 1e-5;   ///< float against double, relative.
  double backward = 1e-4;  ///< float gradient against that in double, relative.
  double gradient = 1e-6;  ///< Gradient in double against central differences, relative.
};

template <class P, class V>
std::vector<V> law_score(P const& p, std::vector<V> const& logits, moe::token const& t) {
  owned_row<V> row(logits, copies_of<P>(0));
  p(row.row(), t);
  return row.scores();
}

template <class P, class V>
std::vector<V> law_score_backward(P const& p, std::vector<V> const& scores,
                                  std::vector<V> const& grad, moe::token const& t) {
  owned_row<V> fixed(scores, copies_of<P>(0));
  owned_row<V> row(grad, copies_of<P>(0));
  p.backward(std::as_const(fixed.row()), row.row(), t);
  return row.scores();
}

/// Laws of a score_policy: candidates are kept, results are finite and a function of the arguments,
/// float agrees with double, and backward with central differences.
template <class P>
  requires moe::score_policy<P, moe::array_row<float>> &&
           moe::score_policy<P, moe::array_row<double>>
void score_policy_laws(P const& p, law_options const& options = {}) {
  moe::token const t = options.token;
  for (int const E : options.sizes)
    for (double const missing : {0.0, 0.3, 1.0}) {
      CAPTURE(E);
      CAPTURE(missing);
      auto const logits = law_scores<float>(E, 3, missing, options.mean, options.sd);
      auto const wide = law_cast<double>(logits);
      auto const scores = law_score(p, logits, t);
      auto const exact = law_score(p, wide, t);
      auto const again = law_score(P(p), logits, t);
      for (std::size_t e = 0; e < logits.size(); ++e) {
        CAPTURE(e);
        CHECK(law_same(scores[e], again[e]));
        CHECK(moe::is_candidate(scores[e]) == moe::is_candidate(logits[e]));
        CHECK(moe::is_candidate(exact[e]) == moe::is_candidate(wide[e]));
        if (!moe::is_candidate(logits[e])) continue;
        CHECK(std::isfinite(scores[e]));
        CHECK(law_close(double(scores[e]), exact[e], options.forward));
      }

      auto const dscores = law_scores<double>(E, 4);
      auto const dlogits = law_score_backward(p, exact, dscores, t);
      auto const narrow = law_score_backward(p, scores, law_cast<float>(dscores), t);
      for (std::size_t e = 0; e < logits.size(); ++e) {
        CAPTURE(e);
        if (!moe::is_candidate(logits[e])) {
          CHECK(dlogits[e] == 0);
          CHECK(narrow[e] == 0);
          continue;
        }
        double const h = 1e-5;
        double difference = 0;
        for (double const side : {1.0, -1.0}) {
          auto moved = wide;
          moved[e] += side * h;
          auto const s = law_score(p, moved, t);
          for (std::size_t i = 0; i < s.size(); ++i)
            if (moe::is_candidate(s[i])) difference += side * dscores[i] * (s[i] - exact[i]);
        }
        CHECK(law_close(dlogits[e], difference / (2 * h), options.gradient));
        CHECK(law_close(double(narrow[e]), dlogits[e], options.backward));
      }
    }

  // Logits as large as they come keep their candidates, too.
  for (float const scale : {1.0f, 80.0f, 1e4f}) {
    std::vector<float> const logits{-scale, 0, scale, moe::no_score<float>, scale};
    auto const scores = law_score(p, logits, t);
    for (std::size_t e = 0; e < logits.size(); ++e) {
      CAPTURE(scale);
      CAPTURE(e);
      CHECK(moe::is_candidate(scores[e]) == moe::is_candidate(logits[e]));
      if (moe::is_candidate(logits[e])) CHECK(std::isfinite(scores[e]));
    }
  }
}

/// Whether the first k of these choices are different ids in [0, E) that were candidates, then -1.
template <int MaxK, class V>
void law_check_choices(moe::choices<MaxK, V> const& chosen, int k, std::vector<V> const& keys) {
  int const E = static_cast<int>(keys.size());
  REQUIRE(chosen.k == k);
  for (int j = 0; j < k; ++j) {
    int const e = chosen.expert[j];
    CAPTURE(j);
    CAPTURE(e);
    REQUIRE(e >= -1);
    REQUIRE(e < E);
    if (e < 0) continue;
    if (j > 0) CHECK(chosen.expert[j - 1] >= 0);  // -1 comes last
    CHECK(moe::is_candidate(keys[static_cast<std::size_t>(e)]));
    for (int i = 0; i < j; ++i) CHECK(chosen.expert[i] != e);
  }
}

template <class P, class V>
void select_policy_laws_of(P const& p, law_options const& options) {
  using Chosen = moe::choices<P::max_k, V>;
  REQUIRE(p.k() >= 1);
  REQUIRE(p.k() <= P::max_k);
  for (int const E : options.sizes)
    for (double const missing : {0.0, 0.3, 0.9, 1.0})
      for (bool const ties : {false, true}) {
        CAPTURE(E);
        CAPTURE(missing);
        CAPTURE(ties);
        auto keys = law_scores<V>(E, 5, missing, options.mean, options.sd);
        if (ties)
          for (V& s : keys) s = std::round(s);
        Chosen results[2];
        for (Chosen& chosen : results) {
          std::fill(std::begin(chosen.expert), std::end(chosen.expert), E + 7);
          owned_row<V> row(keys, copies_of<P>(0));
          P const same(p);
          same(row.row(), chosen, options.token);
          law_check_choices(chosen, p.k(), keys);
        }
        for (int j = 0; j < p.k(); ++j) CHECK(results[0].expert[j] == results[1].expert[j]);
        if (missing == 1.0)
          for (int j = 0; j < p.k(); ++j) CHECK(results[0].expert[j] == -1);
      }
}

/// Laws of a select_policy: different live ids, the rest -1, a function of the arguments.
template <class P>
  requires moe::select_policy<P, moe::array_row<float>> &&
           moe::select_policy<P, moe::array_row<double>>
void select_policy_laws(P const& p, law_options const& options = {}) {
  select_policy_laws_of<P, float>(p, options);
  select_policy_laws_of<P, double>(p, options);
}

template <class P, int MaxK, class V>
moe::choices<MaxK, V> law_weigh(P const& p, std::vector<V> const& scores,
                                moe::choices<MaxK, V> chosen) {
  std::fill(std::begin(chosen.weight), std::end(chosen.weight), V(99));
  owned_row<V> row(scores, copies_of<P>(0));
  p(std::as_const(row.row()), chosen);
  return chosen;
}

template <class P, int MaxK, class V>
std::vector<V> law_weigh_backward(P const& p, std::vector<V> const& scores,
                                  moe::choices<MaxK, V> const& chosen,
                                  moe::choices<MaxK, V> const& dchosen,
                                  std::vector<V> const& start) {
  owned_row<V> fixed(scores, copies_of<P>(0));
  owned_row<V> grad(start, copies_of<P>(0));
  p.backward(std::as_const(fixed.row()), chosen, dchosen, grad.row());
  return grad.scores();
}

/// Laws of a weigh_policy for up to MaxK choices: the choices stay, weights are finite and 0 where
/// there is no expert, float agrees with double, backward adds and agrees with central differences.
/// Scores are positive unless the options say otherwise.
template <class P, int MaxK = 4>
  requires moe::weigh_policy<P, moe::array_row<float>, MaxK> &&
           moe::weigh_policy<P, moe::array_row<double>, MaxK>
void weigh_policy_laws(P const& p, law_options options = {.mean = 2, .sd = 0.4}) {
  using Chosen = moe::choices<MaxK, double>;
  for (int const E : options.sizes)
    for (int k = 1; k <= MaxK; ++k)
      for (int given = 0; given <= std::min(k, E); ++given) {
        CAPTURE(E);
        CAPTURE(k);
        CAPTURE(given);
        auto const wide = law_cast<double>(law_scores<float>(E, 6, 0, options.mean, options.sd));
        auto const scores = law_cast<float>(wide);
        Chosen chosen, dchosen;
        moe::choices<MaxK, float> narrow, dnarrow;
        chosen.k = dchosen.k = narrow.k = dnarrow.k = k;
        for (int j = 0; j < k; ++j) {
          chosen.expert[j] = narrow.expert[j] = j < given ? (E / 2 + j) % E : -1;
          dchosen.expert[j] = dnarrow.expert[j] = chosen.expert[j];
          dchosen.weight[j] = dnarrow.weight[j] = 0.5f + 0.25f * static_cast<float>(j);
        }
        auto const weighed = law_weigh(p, wide, chosen);
        auto const rounded = law_weigh(p, scores, narrow);
        REQUIRE(weighed.k == k);
        for (int j = 0; j < k; ++j) {
          CAPTURE(j);
          CHECK(weighed.expert[j] == chosen.expert[j]);
          if (j >= given) {
            CHECK(weighed.weight[j] == 0);
            CHECK(rounded.weight[j] == 0);
          }
          CHECK(std::isfinite(weighed.weight[j]));
          CHECK(law_close(double(rounded.weight[j]), weighed.weight[j], options.forward));
        }

        std::vector<double> const zero(wide.size(), 0.0);
        auto const start = law_scores<double>(E, 7);
        auto const dscores = law_weigh_backward(p, wide, weighed, dchosen, zero);
        auto const added = law_weigh_backward(p, wide, weighed, dchosen, start);
        auto const dfloat =
            law_weigh_backward(p, scores, rounded, dnarrow, std::vector<float>(wide.size(), 0.0f));
        for (std::size_t e = 0; e < wide.size(); ++e) {
          CAPTURE(e);
          CHECK(law_close(added[e], start[e] + dscores[e], 1e-12));
          CHECK(law_close(double(dfloat[e]), dscores[e], options.backward));
          double const h = 1e-5;
          double difference = 0;
          for (double const side : {1.0, -1.0}) {
            auto moved = wide;
            moved[e] += side * h;
            auto const there = law_weigh(p, moved, chosen);
            for (int j = 0; j < k; ++j)
              difference += side * dchosen.weight[j] * (there.weight[j] - weighed.weight[j]);
          }
          CHECK(law_close(dscores[e], difference / (2 * h), options.gradient));
        }
      }
}

/// What a gate made of one token's logits.
template <class G, class V>
struct gated {
  std::vector<V> scores;
  moe::choices<G::max_k, V> chosen;
};

template <class V, class G>
gated<G, V> law_gate(G const& g, std::vector<V> const& logits, moe::token const& t) {
  gated<G, V> result{};
  std::fill(std::begin(result.chosen.expert), std::end(result.chosen.expert), 12345);
  std::fill(std::begin(result.chosen.weight), std::end(result.chosen.weight), V(99));
  owned_row<V> row(logits, copies_of<G>(2));
  g(row.row(), result.chosen, t);
  result.scores = row.scores();
  return result;
}

template <class G, class V>
void token_gate_laws_of(G const& g, law_options const& options) {
  for (int const E : options.sizes)
    for (double const missing : {0.0, 0.3, 1.0}) {
      CAPTURE(E);
      CAPTURE(missing);
      auto const logits = law_scores<V>(E, 8, missing, options.mean, options.sd);
      auto const made = law_gate(g, logits, options.token);
      auto const again = law_gate(G(g), logits, options.token);
      law_check_choices(made.chosen, g.k(), logits);
      for (std::size_t e = 0; e < logits.size(); ++e) {
        CHECK(law_same(made.scores[e], again.scores[e]));
        if (!moe::is_candidate(logits[e])) CHECK(!moe::is_candidate(made.scores[e]));
        CHECK(made.scores[e] == made.scores[e]);
      }
      for (int j = 0; j < g.k(); ++j) {
        CAPTURE(j);
        CHECK(made.chosen.expert[j] == again.chosen.expert[j]);
        CHECK(law_same(made.chosen.weight[j], again.chosen.weight[j]));
        CHECK(std::isfinite(made.chosen.weight[j]));
        if (made.chosen.expert[j] < 0) CHECK(made.chosen.weight[j] == 0);
      }
    }
}

/// Laws of a token_gate: those of a select_policy and a weigh_policy together, and backward against
/// central differences of the weights and the scores with the choice of experts held fixed.
template <class G>
  requires moe::token_gate<G, moe::array_row<float>> && moe::token_gate<G, moe::array_row<double>>
void token_gate_laws(G const& g, law_options const& options = {}) {
  REQUIRE(g.k() >= 1);
  REQUIRE(g.k() <= G::max_k);
  token_gate_laws_of<G, float>(g, options);
  token_gate_laws_of<G, double>(g, options);

  int checked = 0;
  for (int const E : options.sizes)
    for (double const missing : {0.0, 0.3}) {
      CAPTURE(E);
      CAPTURE(missing);
      auto const logits = law_scores<double>(E, 9, missing, options.mean, options.sd);
      auto const made = law_gate(g, logits, options.token);
      auto const direct = law_scores<double>(E, 10);  // what reaches the scores from a loss
      auto dchosen = made.chosen;
      for (int j = 0; j < g.k(); ++j) dchosen.weight[j] = 0.5 + 0.25 * j;

      owned_row<double> fixed(made.scores, copies_of<G>(2));
      owned_row<double> grad(direct, copies_of<G>(2));
      g.backward(std::as_const(fixed.row()), made.chosen, dchosen, grad.row(), options.token);
      for (std::size_t e = 0; e < logits.size(); ++e) {
        CAPTURE(e);
        if (!moe::is_candidate(logits[e])) {
          CHECK(grad.scores()[e] == 0);
          continue;
        }
        double const h = 1e-5;
        double difference = 0;
        bool same_choice = true;
        for (double const side : {1.0, -1.0}) {
          auto moved = logits;
          moved[e] += side * h;
          auto const there = law_gate(g, moved, options.token);
          for (int j = 0; j < g.k(); ++j) {
            same_choice = same_choice && there.chosen.expert[j] == made.chosen.expert[j];
            difference +=
                side * dchosen.weight[j] * (there.chosen.weight[j] - made.chosen.weight[j]);
          }
          for (std::size_t i = 0; i < logits.size(); ++i)
            if (moe::is_candidate(made.scores[i]) && moe::is_candidate(there.scores[i]))
              difference += side * direct[i] * (there.scores[i] - made.scores[i]);
        }
        if (!same_choice) continue;  // on an edge, where there is no derivative
        ++checked;
        CHECK(law_close(grad.scores()[e], difference / (2 * h), options.gradient));
      }
    }
  CHECK(checked > 0);
}

// --------------------------------------------------------------------------------------------------

/// Laws of a worker_team: each member once and only once, results visible to the caller, failures
/// handed on, usable afterwards.
template <moe::worker_team Team>
void worker_team_laws(Team& team) {
  int const members = static_cast<int>(team.size());
  REQUIRE(members >= 1);

  struct counts {
    std::vector<int> calls;  // one element for each member, so that members do not share any
    int strangers = 0;
    int throwing = -1;
  };
  auto const count = [](void* context, int member) {
    counts& c = *static_cast<counts*>(context);
    if (member < 0 || member >= static_cast<int>(c.calls.size()))
      ++c.strangers;
    else
      ++c.calls[static_cast<std::size_t>(member)];
    if (member == c.throwing) throw std::runtime_error("member " + std::to_string(member));
  };

  counts c{.calls = std::vector<int>(static_cast<std::size_t>(members), 0)};
  constexpr int rounds = 100;
  for (int round = 0; round < rounds; ++round) team.run(count, &c);
  for (int const calls : c.calls) CHECK(calls == rounds);
  CHECK(c.strangers == 0);

  for (int member = 0; member < members; ++member) {
    c.throwing = member;
    std::string text = "nothing was thrown";
    try {
      team.run(count, &c);
    } catch (std::runtime_error const& failure) {
      text = failure.what();
    }
    CHECK(text == "member " + std::to_string(member));
  }
  for (int const calls : c.calls) CHECK(calls == rounds + members);

  auto const all_throw = [](void*, int) { throw std::runtime_error("all"); };
  CHECK_THROWS_WITH_AS(team.run(all_throw, nullptr), "all", std::runtime_error);

  c.throwing = -1;
  team.run(count, &c);
  for (int const calls : c.calls) CHECK(calls == rounds + members + 1);
}

/// Laws of a noise_source: finite, a function of (id, seed, step, expert) alone, and of each.
template <moe::noise_source N>
void noise_source_laws(N const& n) {
  constexpr int tokens = 64, experts = 16;
  int same_id = 0, same_seed = 0, same_step = 0, same_expert = 0;
  for (int i = 0; i < tokens; ++i)
    for (int e = 0; e < experts; ++e) {
      moe::token const t{.id = i, .row = i, .seed = 7, .step = 3, .training = true};
      auto const draw = [&n](moe::token const& at, int expert) {
        return static_cast<float>(n(at, expert));
      };
      float const value = draw(t, e);
      REQUIRE(std::isfinite(value));
      auto moved = t;
      moved.row = 1000 - i;  // another place in another batch
      CHECK(draw(moved, e) == value);
      CHECK(static_cast<float>(N(n)(t, e)) == value);
      moved = t, moved.id += tokens;
      same_id += draw(moved, e) == value;
      moved = t, moved.seed += 1;
      same_seed += draw(moved, e) == value;
      moved = t, moved.step += 1;
      same_step += draw(moved, e) == value;
      same_expert += draw(t, e + experts) == value;
    }
  // Two draws of 2^23 numbers are rarely equal, and never most of them.
  CHECK(same_id < 4);
  CHECK(same_seed < 4);
  CHECK(same_step < 4);
  CHECK(same_expert < 4);
}

}  // namespace moe_test
