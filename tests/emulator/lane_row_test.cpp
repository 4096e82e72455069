#include <array>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <string>
#include <vector>

#include <moe/core/lane_row.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>

#include "emulator/gate_bits.hpp"
#include "emulator/on_lanes.hpp"
#include "support/laws.hpp"

using moe_test::check_bits;
using moe_test::evaluate;
using moe_test::in_sub_warps;
using moe_test::in_whole_block;
using moe_test::same_bits;
using moe_test::schedule;
using moe_test::schedules;
using moe_test::tied_logits;

namespace {

static_assert(moe::score_row<in_sub_warps<1, 8>::row>);
static_assert(moe::score_row<in_sub_warps<32, 32>::row>);
static_assert(moe::score_row<in_whole_block<22, 192>::row>);

/// A user's select policy, which knows a row and nothing of lanes: the best expert of the half of
/// higher maximum, then the best of the other one; experts below the mean of all do not count.
struct best_of_halves {
  static constexpr int max_k = 2;
  static constexpr int copies = 1;

  MOE_HOST_DEVICE constexpr int k() const { return 2; }

  template <moe::score_row R>
  MOE_HOST_DEVICE constexpr void operator()(R& keys,
                                            moe::choices<2, typename R::value_type>& chosen,
                                            moe::token const&) const {
    using V = typename R::value_type;
    int const E = keys.size();
    int const half = E / 2;
    auto const live = [](int, V s) { return moe::is_candidate(s) ? V(1) : V(0); };
    auto const value = [](int, V s) { return moe::is_candidate(s) ? s : V(0); };
    V const mean = keys.sum(value) / keys.sum(live);
    R above = keys.copy();
    above.transform(keys, [=](int, V s, V key) { return key < mean ? moe::no_score<V> : s; });
    bool const second = above.max(half, E) > above.max(0, half);
    chosen.k = 2;
    chosen.expert[0] = above.pop_max(second ? half : 0, second ? E : half).expert;
    chosen.expert[1] = above.pop_max(second ? 0 : half, second ? half : E).expert;
  }
};

template <class Gate>
void check_every_home(Gate const& gate) {
  check_bits<in_sub_warps<1, 8, 32>>(gate, {1, 2, 8});
  check_bits<in_sub_warps<8, 8>>(gate, {1, 2, 8, 31, 32, 33, 60, 64});
  check_bits<in_sub_warps<32, 32>>(gate, {1, 2, 8, 31, 32, 33, 60, 64, 160, 256, 384, 1000, 1024});
  check_bits<in_whole_block<22, 192>>(
      gate, {1, 2, 8, 31, 32, 33, 60, 64, 160, 256, 384, 1000, 1024, 4096});
}

}  // namespace

TEST_CASE("core/lane_row: gates give the bits they give on an array") {
  check_every_home(moe::gate<moe::softmax, moe::top_k<2>, moe::renormalised>{});
  check_bits<in_sub_warps<4, 16>>(
      moe::gate<moe::sigmoid, moe::top_k<8>, moe::softmax_of_selected>{moe::sigmoid{},
                                                                       moe::top_k<8>(5)},
      {5, 8, 31, 64});
}

TEST_CASE("core/lane_row: a user's policy runs unchanged") {
  check_every_home(moe::gate<moe::softmax, best_of_halves, moe::as_scored>{});
}

namespace {

/// pop_best gives what pop_max gives call by call, and read what at gives, in every thread.
template <class Home>
void check_bulk(std::vector<int> const& sizes) {
  float const none = moe::no_score<float>;
  for (int const E : sizes)
    for (int kind = 0; kind < 6; ++kind) {
      if (moe_test::has_thread_sanitizer && (kind > 0 || E < 31 || E > 60)) continue;
      CAPTURE(E);
      CAPTURE(kind);
      auto scores = tied_logits(E, static_cast<unsigned>(kind));
      for (std::size_t e = 0; e < scores.size(); ++e) {
        if (kind == 1) scores[e] = 0.5f;                                       // all equal
        if (kind == 2) scores[e] = e % 3 == 0 ? -0.0f : 0.0f;                  // both zeros
        if (kind == 3) scores[e] = e % 7 == 4 ? static_cast<float>(e) : none;  // few
        if (kind == 4) scores[e] = none;
        if (kind == 5) scores[e] = e % 5 == 1 ? none - none : -static_cast<float>(e % 4);  // NaN
      }
      std::vector<int> wrong(Home::threads);
      moe_test::with_row<Home>(schedule::shuffled, scores, [&](auto& row, int thread) {
        for (int k = 1; k <= 16; k += 5) {
          auto one_by_one = row.copy(), at_once = row.copy();
          int expert[16] = {};
          float value[16] = {};
          at_once.pop_best(k, expert);
          row.read(k, expert, value);
          for (int j = 0; j < 16; ++j) {
            int const expected = j < k ? one_by_one.pop_max(0, E).expert : 0;
            float const score = j < k && expected >= 0 ? row.at(expected) : 0.0f;
            if (expert[j] != expected || value[j] != score)
              ++wrong[static_cast<std::size_t>(thread)];
          }
        }
      });
      CHECK(wrong == std::vector<int>(Home::threads));
    }
}

}  // namespace

TEST_CASE("core/lane_row: the best k at once are those of k calls") {
  check_bulk<in_sub_warps<1, 8, 32>>({1, 5, 8});
  check_bulk<in_sub_warps<4, 5, 32>>({1, 17, 20});
  check_bulk<in_sub_warps<16, 3, 32>>({1, 33, 48});
  check_bulk<in_sub_warps<32, 8, 32>>({1, 31, 33, 160, 256});
  check_bulk<in_sub_warps<32, 16, 32>>({60, 512});
  check_bulk<in_whole_block<7, 64>>({1, 60, 448});
}

TEST_CASE("core/lane_row: each lane gathers a score of its own") {
  using home = in_sub_warps<8, 4, 32>;
  std::vector<float> const scores = moe_test::law_scores<float>(29, 3, 0.1);
  std::vector<int> wrong(home::threads);
  moe_test::with_row<home>(schedule::shuffled, scores, [&](auto& row, int thread) {
    for (int i = 0; i < 29; ++i) {
      int const e = (i * 5 + thread * 3) % 29;
      if (row.gather(e) != scores[static_cast<std::size_t>(e)])
        ++wrong[static_cast<std::size_t>(thread)];
    }
  });
  CHECK(wrong == std::vector<int>(home::threads));
}

TEST_CASE("core/lane_row: registers that are known to be full") {
  using lanes = moe::sub_warp<moe_test::emulated_block, 8>;
  struct nothing {};
  for (int const E : {17, 24, 31, 32}) {
    std::vector<float> const scores = moe_test::law_scores<float>(E, 3, 0.1);
    std::vector<int> wrong(32);
    moe_test::launch_body<32, nothing>(
        schedule::shuffled, 1, 1, [&](moe_test::emulated_block& b, nothing&) {
          lanes group(b);
          auto const load = [&](int e) { return scores[static_cast<std::size_t>(e)]; };
          moe::lane_row<lanes, 4, 2> row(group, E, load);
          moe::lane_row<lanes, 4> plain(group, E, load);
          auto const twice = [&](int e, float s) { return load(e) < 0 ? 2 * s : 3 * s; };
          row.transform(twice);
          plain.transform(twice);
          bool const same = row.max(0, E) == plain.max(0, E) &&
                            row.sum([](int e, float) { return float(e); }) ==
                                plain.sum([](int e, float) { return float(e); }) &&
                            row.pop_max(0, E).expert == plain.pop_max(0, E).expert;
          wrong[static_cast<std::size_t>(b.thread())] = same ? 0 : 1;
        });
    CHECK(wrong == std::vector<int>(32));
  }
}

TEST_CASE("core/lane_row: a key of zero keeps its sign, and both zeros are equal") {
  std::vector<float> const scores{-1.0f, -0.0f, 0.0f, -0.0f};
  moe_test::with_row<in_sub_warps<2, 2, 32>>(schedule::in_order, scores, [](auto& row, int) {
    float const keys[] = {-0.0f, 0.0f, -0.0f, -1.0f};
    int const ids[] = {1, 2, 3, 0};
    for (int j = 0; j < 4; ++j) {
      auto const best = row.pop_max(0, 4);
      if (best.expert != ids[j] || __builtin_signbit(best.key) != __builtin_signbit(keys[j]))
        throw std::string("a wrong choice");
    }
    if (row.pop_max(0, 4).expert != -1) throw std::string("one too many");
  });
}

TEST_CASE("core/lane_row: NaN is no candidate, +inf the best") {
  float const inf = -moe::no_score<float>;
  std::vector<float> const scores{inf - inf, 1.0f, -(inf - inf), inf, moe::no_score<float>};
  moe_test::with_row<in_sub_warps<4, 2, 32>>(schedule::in_order, scores, [&](auto& row, int) {
    if (row.max(0, 3) != 1.0f || row.max(4, 5) != -inf || row.pop_max(0, 5).expert != 3 ||
        row.pop_max(0, 5).expert != 1 || row.pop_max(0, 5).expert != -1)
      throw std::string("a wrong choice");
  });
}

TEST_CASE("core/lane_row: sub-warps of one warp go their own ways") {
  using home = in_sub_warps<8, 4>;
  moe::gate<moe::softmax, best_of_halves, moe::renormalised> const gate;
  int const E = 27;
  int const groups = home::threads / 8;
  std::vector<std::vector<float>> logits, expected;
  for (int g = 0; g < groups; ++g) {
    // In every third row there is no candidate, and softmax returns early.
    logits.push_back(moe_test::law_scores<float>(E, static_cast<unsigned>(g), g % 3 == 1 ? 1 : 0));
    moe_test::owned_row<float> plain(logits.back(), 3);
    evaluate(gate, plain.row(), expected.emplace_back());
  }
  for (schedule const order : schedules) {
    std::vector<std::vector<float>> found(home::threads);
    moe_test::launch_body<home::threads, home::shared>(
        order, 1, 1, [&](moe_test::emulated_block& b, home::shared& s) {
          auto lanes = home::lanes_of(b, s);
          auto const& own = logits[static_cast<std::size_t>(b.thread() / 8)];
          home::row row(lanes, E, [&](int e) { return own[static_cast<std::size_t>(e)]; });
          evaluate(gate, row, found[static_cast<std::size_t>(b.thread())]);
        });
    for (std::size_t t = 0; t < found.size(); ++t) CHECK(same_bits(found[t], expected[t / 8]));
  }
}
