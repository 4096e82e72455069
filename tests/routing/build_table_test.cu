// Tables, kept weights and statistics on a GPU: those of the CPU, index for index.
// Written without a GPU to run it on.
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <random>
#include <vector>

#include <moe/core/gpu.cuh>
#include <moe/routing/build_table.cuh>
#include <moe/routing/kept_weights.cuh>
#include <moe/routing/routing.cuh>
#include <moe/routing/routing_table.cuh>
#include <moe/routing/statistics.cuh>

#include "support/device.cuh"

using moe_test::on_device;

namespace {

/// What a rule of a user looks like that a GPU can call.
struct late_choices_first {
  MOE_HOST_DEVICE float operator()(moe::routed_pair<float> const& pair) const {
    return static_cast<float>(pair.choice) + pair.weight;
  }
};

struct options {
  std::int64_t T;
  int K, E;
  int sources = 1;
  bool skewed = false, masked = false, mapped = false, variable = false;
};

/// A routing here and there.
struct problem {
  std::vector<std::int32_t> expert, source, token_begin, physical_begin, physical;
  std::vector<float> weight;
  std::vector<std::uint8_t> live;
  on_device<std::int32_t> expert_there, source_there, begin_there, physical_begin_there,
      physical_there;
  on_device<float> weight_there;
  on_device<std::uint8_t> live_there;
  moe::routing here, there;
  moe::expert_map map, map_there;

  explicit problem(options const& o)
      : expert_there((fill(o), expert)),
        source_there(source),
        begin_there(token_begin),
        physical_begin_there(physical_begin),
        physical_there(physical),
        weight_there(weight),
        live_there(live) {
    here.T = o.T;
    here.K = o.K;
    here.E = o.E;
    here.tokens.seed = 3;
    here.tokens.training = true;
    there = here;
    here.expert = expert.data();
    here.weight = weight.data();
    there.expert = expert_there.data();
    there.weight = weight_there.data();
    if (o.sources > 1) {
      here.tokens.source = source.data();
      there.tokens.source = source_there.data();
    }
    if (o.masked) {
      here.tokens.live = live.data();
      there.tokens.live = live_there.data();
    }
    if (o.variable) {
      here.token_begin = token_begin.data();
      there.token_begin = begin_there.data();
    }
    if (o.mapped) {
      map = {.physical_begin = physical_begin.data(),
             .physical = physical.data(),
             .P = static_cast<int>(physical.size())};
      map_there = map;
      map_there.physical_begin = physical_begin_there.data();
      map_there.physical = physical_there.data();
    }
  }

  moe::table_shape shape(moe::table_rules const& rules, int sources) const {
    moe::table_shape s{.T = here.T,
                       .K = here.K,
                       .E = here.E,
                       .P = map.P == 0 ? here.E : map.P,
                       .sources = sources};
    s.max_rows = moe::max_rows(rules, s);
    return s;
  }

 private:
  void fill(options const& o) {
    std::mt19937 random(static_cast<unsigned>(o.T + o.E));
    auto const draw = [&](int n) {
      return static_cast<std::int32_t>(random() % static_cast<unsigned>(n));
    };
    token_begin.push_back(0);
    for (std::int64_t t = 0; t < o.T; ++t) {
      source.push_back(draw(o.sources));
      live.push_back(draw(16) != 0);
      std::int32_t const first = draw(o.skewed ? (o.E + 15) / 16 : o.E);
      for (int j = 0; j < o.K; ++j) {  // different ones, as a gate's are
        expert.push_back(draw(200) == 0 ? moe::no_candidate : (first + j) % o.E);
        weight.push_back(static_cast<float>(draw(1000)) / 1024);
      }
      token_begin.push_back(token_begin.back() + draw(o.K + 1));
    }
    physical_begin.push_back(0);
    for (int e = 0; e < o.E; ++e)
      physical_begin.push_back(physical_begin.back() + 1 + (e % 5 == 0));
    for (int p = 0; p < physical_begin.back(); ++p)
      physical.push_back((p * 7 + 3) % physical_begin.back());
    if (physical_begin.back() % 7 == 0)
      for (int p = 0; p < physical_begin.back(); ++p) physical[static_cast<std::size_t>(p)] = p;
  }
};

template <class T>
std::vector<T> copy_of(T const* there, std::int64_t n) {
  std::vector<T> here(static_cast<std::size_t>(n));
  moe::detail::check_cuda(
      cudaMemcpy(here.data(), there, here.size() * sizeof(T), cudaMemcpyDeviceToHost), "copy_of",
      {});
  return here;
}

/// Whether two tables are the same, the first one's arrays being on the device.
void check_same(moe::routing_table const& found, moe::routing_table const& want) {
  auto const same = [](std::int32_t const* there, std::int32_t const* here, std::int64_t n) {
    return copy_of(there, n) == std::vector<std::int32_t>(here, here + n);
  };
  CHECK(same(found.row_of, want.row_of, want.pairs()));
  CHECK(same(found.pair_of, want.pair_of, want.max_rows));
  CHECK(same(found.begin, want.begin, want.segments() + 1));
  CHECK(same(found.used, want.used, want.segments()));
  CHECK(same(found.wanted, want.wanted, want.E));
  CHECK(copy_of(found.counts, 1)[0] == *want.counts);
}

/// Builds by build(exec, routing, map, scratch, table): here, there, and there again as a graph.
template <class Build>
void check_builds(options const& o, moe::table_rules const& rules, Build const& build) {
  CAPTURE(o.T);
  CAPTURE(o.E);
  CAPTURE(static_cast<int>(rules.when_full));
  problem const p(o);
  moe::table_shape const shape = p.shape(rules, o.sources);
  moe::table_buffer want(shape);
  moe::buffer const scratch(moe::build_table_scratch(moe::cpu{}, shape));
  build(moe::cpu{}, p.here, p.map, scratch, want);

  moe::gpu const exec;
  moe::gpu_buffer const room(moe::build_table_scratch(exec, shape));
  moe::gpu_buffer const bytes(moe::table_bytes(shape));
  moe::memory from = bytes;
  moe::routing_table found = moe::carve_table(exec, from, shape);
  build(exec, p.there, p.map_there, room, found);
  moe::detail::check_cuda(cudaDeviceSynchronize(), "check_builds", {});
  check_same(found, want);

  exec.fill(found.row_of, 0x55, static_cast<std::size_t>(o.T * o.K) * 4);
  moe::detail::check_cuda(cudaDeviceSynchronize(), "check_builds", {});
  moe_test::replay_as_graph(
      [&](moe::gpu const& on) { build(on, p.there, p.map_there, room, found); }, 2);
  check_same(found, want);
}

void check(options const& o, moe::table_rules const& rules) {
  check_builds(
      o, rules,
      [&](auto const& exec, auto const& in, auto const& map, moe::memory scratch,
          moe::routing_table& table) { moe::build_table(exec, in, rules, map, scratch, table); });
}

moe::capacity_rule const tight = moe::capacity::deepspeed({.factor = 0.75});

}  // namespace

TEST_CASE("routing/build_table.cu: packed tables, one kernel and two") {
  MOE_NEEDS_GPU();
  for (auto const rank : {moe::order::token_major, moe::order::choice_major}) {
    moe::table_rules const rules{.rank = rank};
    for (std::int64_t const T : {0, 1, 8, 32, 128, 512, 1024, 1025, 4096, 16384, 70000})
      check({.T = T, .K = 8, .E = 256}, rules);
    check({.T = 4096, .K = 2, .E = 8}, rules);
    check({.T = 4096, .K = 1, .E = 1}, rules);
    check({.T = 4096, .K = 10, .E = 512, .skewed = true}, rules);
    check({.T = 3000, .K = 16, .E = 513, .masked = true}, rules);
    check({.T = 3000, .K = 8, .E = 1024}, rules);
    check({.T = 300, .K = 8, .E = 1025}, rules);
    check({.T = 9000, .K = 8, .E = 1500, .variable = true}, rules);
    check({.T = 4096, .K = 8, .E = 64, .sources = 8, .masked = true}, rules);
    check({.T = 4096, .K = 8, .E = 256, .sources = 16}, rules);
  }
}

TEST_CASE("routing/build_table.cu: every layout, order and rule for full experts") {
  MOE_NEEDS_GPU();
  for (auto const rows : {moe::layout::packed, moe::layout::padded, moe::layout::aligned})
    for (auto const rank : {moe::order::token_major, moe::order::choice_major})
      for (auto const when_full : {moe::overflow::position, moe::overflow::score,
                                   moe::overflow::random, moe::overflow::batch_prioritised})
        for (std::int64_t const T : {100, 4096}) {
          moe::table_rules const rules{
              .rows = rows, .rank = rank, .cap = tight, .when_full = when_full, .align = 128};
          check({.T = T, .K = 8, .E = 128, .skewed = true, .masked = true}, rules);
          check({.T = T, .K = 4, .E = 60, .mapped = true}, rules);
          check({.T = T, .K = 4, .E = 160, .sources = 4, .mapped = true, .variable = true}, rules);
        }
}

TEST_CASE("routing/build_table.cu: a user's rule") {
  MOE_NEEDS_GPU();
  for (std::int64_t const T : {100, 4096}) {
    moe::table_rules const rules{.cap = tight};
    check_builds({.T = T, .K = 8, .E = 64, .skewed = true}, rules,
                 [&](auto const& exec, auto const& in, auto const& map, moe::memory scratch,
                     moe::routing_table& table) {
                   moe::build_table(exec, in, rules, late_choices_first{}, map, scratch, table);
                 });
  }
}

TEST_CASE("routing/build_table.cu: what is no token_begin and no map is refused") {
  MOE_NEEDS_GPU();
  for (std::int64_t const T : {100, 4096}) {
    problem p({.T = T, .K = 8, .E = 64, .mapped = true, .variable = true});
    for (bool const map_is_wrong : {false, true}) {
      std::vector<std::int32_t> begin = p.token_begin, physical = p.physical;
      std::int32_t& wrong = map_is_wrong ? physical[5] : begin[7];
      wrong = 2147483647;
      on_device<std::int32_t> const begin_there(begin), physical_there(physical);
      moe::routing in = p.there;
      in.token_begin = begin_there.data();
      moe::expert_map map = p.map_there;
      map.physical = physical_there.data();
      moe::gpu const exec;
      moe::table_shape const shape = p.shape({}, 1);
      moe::gpu_buffer const room(moe::build_table_scratch(exec, shape));
      moe::gpu_buffer const bytes(moe::table_bytes(shape));
      moe::memory from = bytes;
      moe::routing_table found = moe::carve_table(exec, from, shape);
      moe::build_table(exec, in, {}, map, room, found);
      moe::detail::check_cuda(cudaDeviceSynchronize(), "test", {});
      std::int64_t const pairs = p.here.pairs();
      CHECK(copy_of(found.counts, 1)[0] == moe::table_counts{.refused = pairs});
      CHECK(copy_of(found.row_of, pairs) ==
            std::vector<std::int32_t>(static_cast<std::size_t>(pairs), moe::dropped_row));
    }
  }
}

TEST_CASE("routing/build_table.cu: kept weights, loads and co-activation") {
  MOE_NEEDS_GPU();
  problem const p({.T = 4096, .K = 8, .E = 128, .skewed = true, .masked = true});
  moe::table_rules const rules{.cap = tight};
  moe::table_shape const shape = p.shape(rules, 1);
  moe::table_buffer want(shape);
  moe::buffer const scratch(moe::build_table_scratch(moe::cpu{}, shape));
  build_table(moe::cpu{}, p.here, rules, scratch, want);
  moe::gpu const exec;
  moe::gpu_buffer const room(moe::build_table_scratch(exec, shape));
  moe::gpu_buffer const bytes(moe::table_bytes(shape));
  moe::memory from = bytes;
  moe::routing_table found = moe::carve_table(exec, from, shape);
  build_table(exec, p.there, rules, room, found);

  auto const rule = moe::kept_weights::renormalised;
  std::vector<float> kept(p.weight.size()), dkept(p.weight.size());
  weigh_kept(moe::cpu{}, rule, want, p.weight.data(), kept.data());
  weigh_kept_backward(moe::cpu{}, rule, want, p.weight.data(), p.weight.data(), dkept.data());
  on_device<float> const kept_there(kept.size()), dkept_there(kept.size());
  float const* const weight = p.weight_there.data();
  weigh_kept(exec, rule, found, weight, kept_there.data());
  weigh_kept_backward(exec, rule, found, weight, weight, dkept_there.data());
  CHECK(kept_there.get() == kept);
  auto const dfound = dkept_there.get();
  for (std::size_t i = 0; i < dkept.size(); ++i)
    CHECK(std::abs(dfound[i] - dkept[i]) <= 1e-5f * (1 + std::abs(dkept[i])));

  std::vector<std::int32_t> loads(128);
  physical_loads(want, loads);
  on_device<std::int32_t> const loads_there(128);
  on_device<moe::load_statistics> const load(1);
  physical_loads(exec, found, {loads_there.data(), 128});
  measure_load(exec, {loads_there.data(), 128}, load.data());
  CHECK(loads_there.get() == loads);
  auto const measured = moe::measure_load(loads);
  CHECK(load.get()[0].total == measured.total);
  CHECK(load.get()[0].greatest == measured.greatest);
  CHECK(load.get()[0].entropy == doctest::Approx(measured.entropy).epsilon(1e-12));
  CHECK(load.get()[0].variation == doctest::Approx(measured.variation).epsilon(1e-12));

  std::vector<std::int64_t> together(128 * 128);
  count_co_activation(moe::cpu{}, p.here, moe::matrix_view(together.data(), 128, 128));
  on_device<std::int64_t> const together_there(together.size());
  count_co_activation(exec, p.there, moe::matrix_view(together_there.data(), 128, 128));
  CHECK(together_there.get() == together);

  std::mt19937 random(1);
  std::vector<float> scores(4096 * 128);
  for (float& s : scores) s = static_cast<float>(random() % 1000) / 1000;
  on_device<float> const scores_there(scores);
  on_device<moe::score_statistics> const score(1);
  moe::buffer const part(moe::measure_scores_scratch(4096));
  moe::gpu_buffer const part_there(moe::measure_scores_scratch(exec, 4096));
  auto const mean =
      measure_scores(moe::cpu{}, p.here, moe::matrix_view(scores.data(), 4096, 128), part);
  measure_scores(exec, p.there, moe::matrix_view(scores_there.data(), 4096, 128), part_there,
                 score.data());
  auto const mean_there = score.get()[0];
  CHECK(mean_there.tokens == mean.tokens);
  CHECK(mean_there.margins == mean.margins);
  CHECK(mean_there.entropy == doctest::Approx(mean.entropy).epsilon(1e-10));
  CHECK(mean_there.margin == doctest::Approx(mean.margin).epsilon(1e-10));
}
