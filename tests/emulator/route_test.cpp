#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <string>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/scalar.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/noise.hpp>
#include <moe/gate/route.cuh>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>

#include "emulator/emulated_gpu.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/worse.hpp"

namespace {

using moe_test::emulated_gpu;
using moe_test::on_emulator;
using moe_test::refusal;
using moe_test::says;

/// Logits of T tokens with ties, tokens with few candidates or none, masked and invalid ones.
template <class L>
struct problem {
  std::int64_t T;
  int E;
  std::int64_t ld;
  std::vector<L> logits;  // [T,E]
  std::vector<std::uint8_t> live;
  std::vector<std::int64_t> ids;

  problem(std::int64_t tokens, int experts, int gap = 0)
      : T(tokens), E(experts), ld(experts + gap) {
    if (T > 0) logits.resize(static_cast<std::size_t>((T - 1) * ld + E));
    for (std::int64_t t = 0; t < T; ++t) {
      auto row = moe_test::law_scores<float>(E, static_cast<unsigned>(t), t % 5 == 1 ? 0.9 : 0.0);
      for (int e = 0; e < E; ++e) {
        float l = row[static_cast<std::size_t>(e)];
        if (t % 5 == 2) l = static_cast<float>(static_cast<int>(l)) * (e % 2 == 0 ? 1.0f : -1.0f);
        if (t % 11 == 3) l = moe::no_score<float>;
        if (t % 13 == 4 && e == E - 1) l = -moe::no_score<float>;
        if (t % 13 == 6 && e == E / 2) l = std::numeric_limits<float>::quiet_NaN();
        logits[static_cast<std::size_t>(t * ld + e)] = static_cast<L>(l);
      }
      live.push_back(t % 7 == 4 ? 0 : 1);
      ids.push_back(1000 - 3 * t);
    }
  }

  moe::matrix_view<L const> view() const { return {logits.data(), T, E, ld}; }
  moe::batch tokens() const {
    return {.ids = ids.data(), .seed = 3, .step = 2, .training = true, .live = live.data()};
  }
};

/// Everything that routing writes; arrays of the exact size.
struct result {
  std::vector<int> expert;
  std::vector<float> weight, score, scores;
  moe::routing routed;

  template <class P>
  result(P const& p, int k, bool keep_scores, bool keep_score) {
    auto const pairs = static_cast<std::size_t>(p.T * k);
    expert.resize(pairs, 77);
    weight.resize(pairs, 77);
    if (keep_score) score.resize(pairs, 77);
    if (keep_scores) scores.resize(static_cast<std::size_t>(p.T * p.E), 77);
    routed.T = p.T;
    routed.K = k;
    routed.E = p.E;
    routed.expert = expert.data();
    routed.weight = weight.data();
    routed.score = keep_score ? score.data() : nullptr;
  }
  result(result const&) = delete;

  moe::matrix_view<float> scores_view() {
    if (scores.empty()) return {};
    return {scores.data(), routed.T, routed.E};
  }
  bool operator==(result const& other) const {
    return expert == other.expert && weight == other.weight && score == other.score &&
           scores == other.scores;
  }
};

template <class Gate, class L>
void route_on_cpu(Gate const& gate, problem<L> const& p, result& r) {
  moe::cpu const exec;
  moe::buffer const scratch(moe::route_scratch<Gate>(exec, p.E));
  moe::route(exec, gate, p.view(), p.tokens(), scratch, r.routed, r.scores_view());
}

/// The launcher gives what `route` gives, bit by bit: here both call the same functions.
template <class Gate, class L>
void check_route(Gate const& gate, problem<L> const& p, bool keep_scores, bool keep_score) {
  CAPTURE(p.T);
  CAPTURE(p.E);
  result expected(p, gate.k(), keep_scores, keep_score);
  route_on_cpu(gate, p, expected);
  on_emulator([&](emulated_gpu const& exec) {
    CHECK(moe::route_scratch<Gate>(exec, p.E) == 0);
    result found(p, gate.k(), keep_scores, keep_score);
    found.routed.chunk_counts.chunk = 9;
    moe::route(exec, gate, p.view(), p.tokens(), {}, found.routed, found.scores_view());
    CHECK(found == expected);
    CHECK(found.routed.tokens.live == p.live.data());
    CHECK(found.routed.chunk_counts.chunk == 0);
  });
}

template <class V>
void check_close(std::vector<V> const& found, std::vector<double> const& expected) {
  REQUIRE(found.size() == expected.size());
  double worst = 0;
  for (std::size_t i = 0; i < found.size(); ++i)
    worst = moe_test::worse(worst, std::abs(static_cast<double>(found[i]) - expected[i]) /
                                       std::max(1.0, std::abs(expected[i])));
  CHECK(worst < 2e-6);  // floats of at most a few dozen tokens
}

/// The sums are those of the CPU's routing, counted plainly.
template <class Gate, class L>
void check_sums(Gate const& gate, problem<L> const& p, std::int64_t chunk, bool scores_masked) {
  CAPTURE(p.T);
  CAPTURE(p.E);
  result expected(p, gate.k(), true, false);
  route_on_cpu(gate, p, expected);
  std::int64_t const chunks = (p.T + chunk - 1) / chunk, E = p.E;
  std::vector<int> pairs(static_cast<std::size_t>(chunks * (E + 4)));
  std::vector<int> first(static_cast<std::size_t>(chunks * E));
  std::vector<double> score(first.size()), z(static_cast<std::size_t>(chunks * 2));
  for (std::int64_t t = 0; t < p.T; ++t) {
    std::int64_t const c = t / chunk;
    int* const own = pairs.data() + c * (E + 4);
    bool const live = p.live[static_cast<std::size_t>(t)] != 0;
    int const* const expert = expected.expert.data() + t * gate.k();
    bool const invalid = expert[0] == moe::invalid_token;
    if (!live) ++own[E + 2];
    if (invalid) ++own[E + 3];
    for (int j = 0; j < gate.k() && live && !invalid; ++j) {
      ++own[expert[j] < 0 ? E : expert[j]];
      if (j == 0 && expert[0] >= 0) ++first[static_cast<std::size_t>(c * E + expert[0])];
    }
    for (std::int64_t e = 0; e < E && (live || scores_masked); ++e)
      if (float const s = expected.scores[static_cast<std::size_t>(t * E + e)];
          moe::is_candidate(s))
        score[static_cast<std::size_t>(c * E + e)] += static_cast<double>(s);
    double sum = 0;
    for (std::int64_t e = 0; e < E; ++e) sum += std::exp(static_cast<double>(p.view()(t, e)));
    if (live && !invalid && sum > 0) {
      z[static_cast<std::size_t>(2 * c)] += std::log(sum) * std::log(sum);
      z[static_cast<std::size_t>(2 * c + 1)] += 1;
    }
  }
  on_emulator([&](emulated_gpu const& exec) {
    result found(p, gate.k(), false, false);
    std::vector<int> found_pairs(pairs.size(), 9), found_first(first.size(), 9);
    std::vector<float> found_score(score.size(), 9);
    std::vector<double> found_z(z.size(), 9);
    moe::gate_sums sums;
    sums.chunk = chunk;
    sums.chunks = chunks;
    sums.scores_masked = scores_masked;
    sums.pairs = found_pairs.data();
    moe::route(exec, gate, p.view(), p.tokens(), {}, found.routed, {}, sums);
    CHECK(found.routed.chunk_counts.counts == found_pairs.data());
    CHECK(found.routed.chunk_counts.chunk == (p.T == 0 ? 0 : chunk));  // p.T = 0: no array
    CHECK(found.routed.chunk_counts.chunks == chunks);
    CHECK(found_pairs == pairs);
    std::fill(found_pairs.begin(), found_pairs.end(), 9);
    sums.first = found_first.data();
    sums.score = found_score.data();
    sums.z = found_z.data();
    moe::route(exec, gate, p.view(), p.tokens(), {}, found.routed, {}, sums);
    CHECK(found.expert == expected.expert);
    CHECK(found_pairs == pairs);
    CHECK(found_first == first);
    check_close(found_score, score);
    check_close(found_z, z);
  });
}

template <class Gate, class L>
void check_backward(Gate const& gate, problem<L> const& p, bool of_experts, bool of_tokens) {
  CAPTURE(p.T);
  CAPTURE(p.E);
  int const K = gate.k();
  result chosen(p, K, false, false);
  route_on_cpu(gate, p, chosen);
  if (p.T > 0) chosen.expert[0] = p.E + 5;  // as any caller's mistake: no expert
  if (p.T > 15) chosen.expert[static_cast<std::size_t>(15 * K)] = moe::invalid_token;
  auto const dweight = moe_test::normals<float>(p.T * K, 1);
  auto const dexpert = moe_test::normals<float>(p.E, 2);
  auto const dtoken = moe_test::normals<float>(p.T * p.E, 3);
  moe::score_gradient<float> dscores;
  if (of_experts) dscores.expert = moe::vector_view<float const>(dexpert);
  if (of_tokens) dscores.token = {dtoken.data(), p.T, p.E};
  dscores.reaches_masked = of_tokens;
  moe::matrix_view<float const> dw;
  if (p.T % 2 == 1) dw = {dweight.data(), p.T, K};
  std::vector<float> expected(static_cast<std::size_t>(p.T * p.E), 77);
  moe::cpu const cpu;
  moe::buffer const scratch(moe::route_scratch<Gate>(cpu, p.E));
  moe::route_backward(cpu, gate, p.view(), chosen.routed, dw, dscores, scratch,
                      moe::matrix_view(expected, p.T, p.E));
  on_emulator([&](emulated_gpu const& exec) {
    std::vector<float> found(expected.size(), 77);
    moe::route_backward(exec, gate, p.view(), chosen.routed, dw, dscores, {},
                        moe::matrix_view(found, p.T, p.E));
    CHECK(found == expected);
  });
}

using mixtral = moe::gate<moe::softmax, moe::top_k<2>, moe::renormalised>;
using wide = moe::gate<moe::sigmoid, moe::top_k<16>, moe::scaled<moe::renormalised>>;
using gpt_oss = moe::gate<moe::identity, moe::top_k<4>, moe::softmax_of_selected>;
using sampled = moe::gate<moe::softmax, moe::sampled<moe::top_k<2>>, moe::as_scored>;
using gshard = moe::random_second<mixtral>;
using replay = moe::gate<moe::softmax, moe::replayed<2>, moe::renormalised>;

/// A user's gate, which is no composition and knows no rescore: the best expert of each half.
struct halves {
  static constexpr int max_k = 2;
  int k() const { return 2; }

  template <moe::score_row R>
  void operator()(R& row, moe::choices<2, typename R::value_type>& chosen,
                  moe::token const&) const {
    R keys = row.copy();
    int const E = row.size();
    chosen.k = 2;
    chosen.expert[0] = keys.pop_max(0, E / 2).expert;
    chosen.expert[1] = keys.pop_max(E / 2, E).expert;
    moe::as_scored{}(row, chosen);
  }
  template <moe::score_row R>
  void backward(R const& scores, moe::choices<2, typename R::value_type> const& chosen,
                moe::choices<2, typename R::value_type> const& dchosen, R& dscores,
                moe::token const& t) const {
    moe::as_scored{}.backward(scores, chosen, dchosen, dscores);
    moe::identity{}.backward(scores, dscores, t);
  }
};

/// Names experts that there are not.
struct beyond {
  static constexpr int max_k = 2;
  int k() const { return 2; }

  void operator()(moe::score_row auto& row, auto& chosen, moe::token const& t) const {
    chosen = {2, {row.size() + static_cast<int>(t.row), 1}, {}};
  }
  void backward(auto const&, auto const&, auto const&, auto&, moe::token const&) const {}
};

moe::top_k<16> any_k(int k) {
  return moe::top_k<16>(k);
}

}  // namespace

TEST_CASE("gate/route on a GPU: as on the CPU, a thread to a token") {
  check_route(mixtral{}, problem<float>(150, 8), true, true);
  check_route(mixtral{}, problem<float>(37, 5, 3), false, false);
  check_route(wide{{}, any_k(1), {}}, problem<moe::bf16>(10, 1), true, true);
  check_route(wide{{}, any_k(7), {.factor = 2.5f}}, problem<moe::bf16>(20, 7), true, true);
}

TEST_CASE("gate/route on a GPU: as on the CPU, a warp to a token") {
  check_route(mixtral{}, problem<float>(37, 60), true, true);
  check_route(wide{{}, any_k(11), {.factor = 2.5f}}, problem<moe::bf16>(33, 100, 1), true, true);
  check_route(wide{{}, any_k(16), {}}, problem<moe::bf16>(17, 16), true, false);
  check_route(gpt_oss{}, problem<float>(18, 160), false, true);
  check_route(gpt_oss{}, problem<float>(15, 384, 5), true, false);
}

TEST_CASE("gate/route on a GPU: as on the CPU, a block to a token") {
  check_route(mixtral{}, problem<float>(7, 513), true, true);
  check_route(wide{{}, any_k(9), {}}, problem<moe::bf16>(5, 4096), false, true);
}

TEST_CASE("gate/route on a GPU: random policies, replay, a user's gate") {
  check_route(sampled{}, problem<float>(20, 40), true, true);
  check_route(gshard{}, problem<float>(20, 8), false, true);
  check_route(gshard{}, problem<float>(20, 64), false, true);
  std::vector<std::int32_t> ids;
  for (int i = 0; i < 42; ++i) ids.push_back(i % 5 == 3 ? -1 : i * 7 % 40);
  check_route(replay{.select = moe::replayed<2>(ids.data(), 2, 2)}, problem<float>(21, 33), true,
              true);
  check_route(halves{}, problem<float>(20, 6), true, true);
  check_route(halves{}, problem<float>(20, 50), false, true);
}

TEST_CASE("gate/route_kernel: a row in a part of a warp, launched by a user") {
  using home = moe::row_home<64, 8, 64>;
  problem<float> const p(37, 60);
  result expected(p, 2, true, true);
  route_on_cpu(mixtral{}, p, expected);
  on_emulator([&](emulated_gpu const& exec) {
    result found(p, 2, true, true);
    found.routed.tokens = p.tokens();
    exec.launch("user", moe::route_kernel<mixtral, home>{}, 3, {}, p.view(), std::int64_t{13},
                found.routed, found.scores_view(), moe::gate_sums{});
    CHECK(found == expected);
  });
}

TEST_CASE("gate/route on a GPU: a gate that names experts that there are not") {
  std::vector<float> const logits(5 * 3);
  std::vector<int> expert(10), pairs(7);
  std::vector<float> weight(10);
  moe::routing routed;
  routed.T = 5;
  routed.K = 2;
  routed.E = 3;
  routed.expert = expert.data();
  routed.weight = weight.data();
  moe::gate_sums sums;
  sums.chunk = 5;
  sums.chunks = 1;
  sums.pairs = pairs.data();
  moe::route(emulated_gpu{}, beyond{}, moe::matrix_view<float const>(logits, 5, 3), {}, {}, routed,
             {}, sums);
  CHECK(expert == std::vector<int>{3, 1, 4, 1, 5, 1, 6, 1, 7, 1});
  CHECK(pairs == std::vector<int>{0, 5, 0, 0, 5, 0, 0});
}

TEST_CASE("gate/route on a GPU: no tokens, one token") {
  for (int const E : {8, 64, 600}) {
    check_route(mixtral{}, problem<float>(0, E), true, true);
    check_route(mixtral{}, problem<float>(1, E), true, true);
    check_backward(mixtral{}, problem<float>(0, E), true, true);
  }
}

TEST_CASE("gate/route on a GPU: sums of chunks") {
  check_sums(mixtral{}, problem<float>(150, 8), 64, false);
  check_sums(mixtral{}, problem<float>(50, 3), 20, true);
  check_sums(mixtral{}, problem<float>(50, 60), 16, true);
  check_sums(wide{{}, any_k(5), {}}, problem<moe::bf16>(33, 130), 7, false);
  check_sums(gpt_oss{}, problem<float>(9, 600), 4, false);
  check_sums(mixtral{}, problem<float>(0, 60), 16, true);
}

TEST_CASE("gate/route on a GPU: all tokens choose the same expert") {
  problem<float> p(100, 20);
  for (std::int64_t t = 0; t < p.T; ++t) p.logits[static_cast<std::size_t>(t * 20 + 7)] = 50;
  std::fill(p.live.begin(), p.live.end(), std::uint8_t{1});
  check_sums(mixtral{}, p, 100, false);
}

TEST_CASE("gate/route_backward on a GPU: as on the CPU") {
  check_backward(mixtral{}, problem<float>(75, 8), true, true);
  check_backward(mixtral{}, problem<float>(35, 60, 2), true, false);
  check_backward(wide{{}, any_k(11), {.factor = 2.5f}}, problem<moe::bf16>(31, 100), false, true);
  check_backward(gpt_oss{}, problem<float>(19, 200), false, false);
  check_backward(gpt_oss{}, problem<float>(7, 600), true, true);
  check_backward(gshard{}, problem<float>(21, 40), true, true);
  check_backward(halves{}, problem<float>(21, 50), true, true);
}

TEST_CASE("gate/carve_gate_sums: all arrays, within the bytes that are asked for") {
  for (std::int64_t const T : {0, 1, 15, 16, 17, 4096, 1 << 20, 1 << 24})
    for (std::int64_t const E : {1, 8, 9, 4096}) {
      if (T > (1 << 20) && E > 9) continue;
      std::size_t const bytes = moe::gate_sums_bytes(T, E);
      moe::memory from(reinterpret_cast<void*>(8), bytes);  // misaligned, and never touched
      auto const sums = moe::carve_gate_sums(from, T, E);
      CHECK(sums.chunk >= 1);
      CHECK(sums.chunk <= moe::gate_sums::most_tokens);
      CHECK(sums.chunk * sums.chunks >= T);
      CHECK(sums.chunk * (sums.chunks - 1) < std::max(T, std::int64_t{1}));
      CHECK(reinterpret_cast<std::uintptr_t>(sums.z + 2 * sums.chunks) <= 8 + bytes);
    }
  moe::memory few(nullptr, 100);
  says(refusal([&] { moe::carve_gate_sums(few, 10, 10); }),
       "carve_gate_sums: memory holds gate_sums_bytes(T, E)");
  says(refusal([&] { moe::carve_gate_sums(few, -1, 10); }), "carve_gate_sums: T >= 0, E >= 1");
}

TEST_CASE("gate/route on a GPU: bad input") {
  emulated_gpu const exec;
  problem<float> const p(3, 10);
  result r(p, 2, false, false);
  auto const route = [&](moe::matrix_view<float const> logits, moe::gate_sums const& sums) {
    return refusal([&] { moe::route(exec, mixtral{}, logits, {}, {}, r.routed, {}, sums); });
  };
  moe::gate_sums sums;
  says(route({p.logits.data(), 3, 9}, sums), "route: the routing has the T and E of the logits");
  says(route(p.view(), sums), "route: sums has T / chunk chunks, 1 <= chunk < 2^15; got chunk = 0");
  sums.chunk = 2;
  sums.chunks = 1;
  says(route(p.view(), sums), "chunk = 2, chunks = 1, T = 3");
  sums.chunk = 0x8000;
  says(route(p.view(), sums), "1 <= chunk < 2^15; got chunk = 32768");
  std::vector<float> const large(5000);
  r.routed.T = 1;
  r.routed.E = 5000;
  says(refusal([&] {
         moe::route(exec, mixtral{}, moe::matrix_view(large, 1, 5000), {}, {}, r.routed);
       }),
       "route: on a GPU, E <= 4096; got E = 5000");
  CHECK(r.routed.tokens.live == nullptr);
  std::vector<float> dlogits(5000);
  says(refusal([&] {
         moe::route_backward(exec, mixtral{}, moe::matrix_view(large, 1, 5000), r.routed, {}, {},
                             {}, moe::matrix_view(dlogits, 1, 5000));
       }),
       "route_backward: on a GPU, E <= 4096; got E = 5000");
  says(refusal([&] {
         moe::route_backward(exec, mixtral{}, p.view(), r.routed, {}, {}, {},
                             moe::matrix_view(dlogits, 3, 10));
       }),
       "route_backward: the routing is one that route made of these logits");
}
