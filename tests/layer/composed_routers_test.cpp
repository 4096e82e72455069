// Routers and layers that are put together from the parts: each against loops, with its gradient.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <functional>
#include <support/gradient.hpp>
#include <support/random.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/dispatch/combine.hpp>
#include <moe/dispatch/dispatch.hpp>
#include <moe/expert/ffn.hpp>
#include <moe/expert/grouped_gemm.hpp>
#include <moe/expert/kinds.hpp>
#include <moe/expert/segments.hpp>
#include <moe/expert/slice.hpp>
#include <moe/gate/biased.hpp>
#include <moe/gate/candidates.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/model_presets.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>
#include <moe/layer/moe_layer.hpp>
#include <moe/layer/router.hpp>
#include <moe/routing/build_table.hpp>
#include <moe/routing/statistics.hpp>

namespace {

using moe_test::normals;
using matrix = moe::matrix_view<double>;
using constant_matrix = moe::matrix_view<double const>;

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

/// A gate of logits that a function makes of x: the sum of c[i] weight[i], and its gradient d/dlogits.
template <class Gate>
struct routed {
  std::int64_t T;
  int E;
  Gate gate{};
  moe::basic_routing_buffer<double> out{T, gate.k(), E};
  moe::buffer scratch{moe::route_scratch<Gate, double>(moe::cpu{}, E)};

  double forward(std::vector<double> const& logits) {
    moe::route({}, gate, moe::matrix_view(logits, T, E), {}, scratch, out);
    double sum = 0;
    for (std::int64_t i = 0; i < T * gate.k(); ++i) sum += (1.0 + double(i % 3)) * out.weight[i];
    return sum;
  }
  std::vector<double> backward(std::vector<double> const& logits) {
    std::vector<double> dweight, dlogits(logits.size());
    for (std::int64_t i = 0; i < T * gate.k(); ++i) dweight.push_back(1.0 + double(i % 3));
    moe::route_backward({}, gate, moe::matrix_view(logits, T, E), out,
                        moe::matrix_view(dweight, T, gate.k()), {}, scratch,
                        moe::matrix_view(dlogits, T, E));
    return dlogits;
  }
};

// --- a gate of hyperbolic distances -----------------------------------------------------------------

/// logits(t, e) = -arcosh(1 + 2 |x - c|^2 / ((1 - |x|^2) (1 - |c|^2))), x and c inside of the unit ball.
struct hyperbolic {
  std::int64_t T, M;
  int E;

  /// {|x - c|^2, 1 - |x|^2, 1 - |c|^2} and the argument of arcosh.
  struct parts {
    double off, x, c, a;
  };
  parts of(double const* x, double const* c) const {
    double off = 0, xx = 0, cc = 0;
    for (std::int64_t m = 0; m < M; ++m) {
      off += (x[m] - c[m]) * (x[m] - c[m]);
      xx += x[m] * x[m];
      cc += c[m] * c[m];
    }
    return {off, 1 - xx, 1 - cc, 1 + 2 * off / ((1 - xx) * (1 - cc))};
  }
  std::vector<double> logits(std::vector<double> const& x, std::vector<double> const& c) const {
    std::vector<double> l;
    for (std::int64_t t = 0; t < T; ++t)
      for (int e = 0; e < E; ++e)
        l.push_back(-std::acosh(of(x.data() + t * M, c.data() + e * M).a));
    return l;
  }
  void backward(std::vector<double> const& x, std::vector<double> const& c,
                std::vector<double> const& dlogits, std::vector<double>& dx,
                std::vector<double>& dc) const {
    dx.assign(x.size(), 0);
    dc.assign(c.size(), 0);
    for (std::int64_t t = 0; t < T; ++t)
      for (int e = 0; e < E; ++e) {
        double const *const a = x.data() + t * M, *const b = c.data() + e * M;
        parts const p = of(a, b);
        double const da = -dlogits[at(t * E + e)] / std::sqrt(p.a * p.a - 1);
        for (std::int64_t m = 0; m < M; ++m) {
          double const toward = 4 * (a[m] - b[m]) / (p.x * p.c);
          dx[at(t * M + m)] += da * (toward + 2 * (p.a - 1) * a[m] / p.x);
          dc[at(e * M + m)] += da * (-toward + 2 * (p.a - 1) * b[m] / p.c);
        }
      }
  }
};

}  // namespace

TEST_CASE("composed/hyperbolic gate: distances from the centre of the ball, by hand") {
  // From 0 the distance is 2 artanh |c|.
  hyperbolic const space{1, 2, 3};
  auto const l = space.logits({0, 0}, {0.5, 0, 0, -0.25, 0.6, 0.6});
  CHECK(l[0] == doctest::Approx(-2 * std::atanh(0.5)));
  CHECK(l[1] == doctest::Approx(-2 * std::atanh(0.25)));
  CHECK(l[2] == doctest::Approx(-2 * std::atanh(std::sqrt(0.72))));
  routed<moe::gate<moe::softmax, moe::top_k<2>, moe::renormalised>> gate{1, 3};
  gate.forward(l);
  CHECK(gate.out.expert[0] == 1);
  CHECK(gate.out.expert[1] == 0);
  // exp(-2 artanh r) = (1 - r) / (1 + r): 3/5 and 1/3.
  CHECK(gate.out.weight[0] == doctest::Approx(9.0 / 14));
}

TEST_CASE("composed/hyperbolic gate: gradients of tokens and centres") {
  hyperbolic const space{4, 3, 5};
  auto const x = normals(4 * 3, 1, 0, 0.25), c = normals(5 * 3, 2, 0, 0.25);
  routed<moe::gate<moe::softmax, moe::top_k<2>, moe::renormalised>> gate{4, 5};
  auto const l = space.logits(x, c);
  gate.forward(l);
  std::vector<double> dx, dc;
  space.backward(x, c, gate.backward(l), dx, dc);
  moe_test::check_gradient([&](auto const& v) { return gate.forward(space.logits(v, c)); }, x, dx);
  moe_test::check_gradient([&](auto const& v) { return gate.forward(space.logits(x, v)); }, c, dc);
}

// --- a gate of Gaussians ----------------------------------------------------------------------------

namespace {

/// logits(t, e) = -|L[e] (x - m[e])|^2 / 2: half the squared Mahalanobis distance of precision L^T L.
struct gaussians {
  std::int64_t T, M;
  int E;

  std::vector<double> whitened(double const* x, double const* mean, double const* L) const {
    std::vector<double> y(at(M));
    for (std::int64_t i = 0; i < M; ++i)
      for (std::int64_t m = 0; m < M; ++m) y[at(i)] += L[i * M + m] * (x[m] - mean[m]);
    return y;
  }
  std::vector<double> logits(std::vector<double> const& x, std::vector<double> const& mean,
                             std::vector<double> const& L) const {
    std::vector<double> l;
    for (std::int64_t t = 0; t < T; ++t)
      for (int e = 0; e < E; ++e) {
        double square = 0;
        for (double const y : whitened(x.data() + t * M, mean.data() + e * M, L.data() + e * M * M))
          square += y * y;
        l.push_back(-square / 2);
      }
    return l;
  }
  void backward(std::vector<double> const& x, std::vector<double> const& mean,
                std::vector<double> const& L, std::vector<double> const& dlogits,
                std::vector<double>& dx, std::vector<double>& dmean,
                std::vector<double>& dl) const {
    dx.assign(x.size(), 0);
    dmean.assign(mean.size(), 0);
    dl.assign(L.size(), 0);
    for (std::int64_t t = 0; t < T; ++t)
      for (int e = 0; e < E; ++e) {
        double const *const a = x.data() + t * M, *const b = mean.data() + e * M;
        double const* const own = L.data() + e * M * M;
        auto const y = whitened(a, b, own);
        for (std::int64_t i = 0; i < M; ++i) {
          double const dy = -dlogits[at(t * E + e)] * y[at(i)];
          for (std::int64_t m = 0; m < M; ++m) {
            dl[at((e * M + i) * M + m)] += dy * (a[m] - b[m]);
            dx[at(t * M + m)] += dy * own[i * M + m];
            dmean[at(e * M + m)] -= dy * own[i * M + m];
          }
        }
      }
  }
};

}  // namespace

TEST_CASE("composed/Gaussian gate: kernels of the candidates of a tile, divided by their sum") {
  // Tile 0 has experts 0, 2 and 3 as candidates, tile 1 has 1 alone; logits of the others do not count.
  gaussians const kernels{2, 1, 4};
  std::vector<double> const x{1, 5}, mean{0, 1, 2, 3}, L{1, 1, 1, 2};
  std::vector<std::int64_t> const begin{0, 3, 4};
  std::vector<std::int32_t> const candidates{3, 0, 2, 1};
  routed<moe::gate<moe::identity, moe::listed<moe::top_k<3>>, moe::softmax_of_selected>> gate{
      2, 4, {.select = {{}, begin.data(), candidates.data()}}};
  gate.forward(kernels.logits(x, mean, L));
  // K = exp(-1/2), exp(-1/2), exp(-8) of experts 0, 2, 3.
  double const sum = 2 * std::exp(-0.5) + std::exp(-8.0);
  int const expected[] = {0, 2, 3, 1, -1, -1};
  for (int i = 0; i < 6; ++i) CHECK(gate.out.expert[i] == expected[i]);
  CHECK(gate.out.weight[0] == doctest::Approx(std::exp(-0.5) / sum));
  CHECK(gate.out.weight[1] == gate.out.weight[0]);
  CHECK(gate.out.weight[2] == doctest::Approx(std::exp(-8.0) / sum));
  CHECK(gate.out.weight[3] == 1);
}

TEST_CASE("composed/Gaussian gate: gradients of tokens, means and precisions") {
  gaussians const kernels{4, 2, 3};
  auto const x = normals(4 * 2, 1), mean = normals(3 * 2, 2), L = normals(3 * 4, 3);
  routed<moe::gate<moe::identity, moe::top_k<2>, moe::softmax_of_selected>> gate{4, 3};
  auto const l = kernels.logits(x, mean, L);
  gate.forward(l);
  std::vector<double> dx, dmean, dl;
  kernels.backward(x, mean, L, gate.backward(l), dx, dmean, dl);
  auto const loss = [&](auto const& a, auto const& b, auto const& c) {
    return gate.forward(kernels.logits(a, b, c));
  };
  moe_test::check_gradient([&](auto const& v) { return loss(v, mean, L); }, x, dx);
  moe_test::check_gradient([&](auto const& v) { return loss(x, v, L); }, mean, dmean);
  moe_test::check_gradient([&](auto const& v) { return loss(x, mean, v); }, L, dl);
}

// --- experts in a latent space ----------------------------------------------------------------------

namespace {

/// The router reads tokens [T,M]; what goes to the experts, over ranks if there are some, is
/// tokens down [T,W]; what comes back is multiplied by up [W,M].
struct latent_layer {
  static constexpr std::int64_t T = 5, M = 6, W = 3, H = 4;
  static constexpr int E = 4, K = 2;
  using experts_type = moe::ffn<moe::gelu>;

  moe::cpu exec{};
  decltype(moe::mixtral()) preset = moe::mixtral();
  experts_type experts{};
  moe::basic_routing_buffer<double> routing{T, K, E};
  moe::table_buffer table{moe::preset_table_shape(preset, T, E)};
  moe::buffer scratch{1 << 20}, saved{1 << 20};
  std::vector<double> logits = std::vector<double>(T * E), weights = std::vector<double>(T * K),
                      latent = std::vector<double>(T * W), mixed = std::vector<double>(T * W);

  /// tokens, router, down, up, experts, in one vector.
  static std::int64_t elements() {
    return T * M + M * E + M * W + W * M + moe::ffn_elements({E, W, H}, false, true);
  }
  template <class V>
  struct views {
    moe::matrix_view<V> tokens, router, down, up;
    moe::ffn_weights<V> experts;
  };
  template <class V>
  static views<V> of(V* p) {
    views<V> v;
    v.tokens = {p, T, M};
    v.router = {p += T * M, M, E};
    v.down = {p += M * E, M, W};
    v.up = {p += M * W, W, M};
    v.experts = moe::carve_ffn(p + W * M, {E, W, H}, false, true);
    return v;
  }

  std::vector<double> forward(std::vector<double> const& numbers) {
    auto const v = of<double const>(numbers.data());
    moe::all_rows const all(T);
    moe::compute_logits<double>(exec, v.tokens, v.router, 0, {}, {logits.data(), T, E}, scratch);
    moe::apply_preset(exec, preset, constant_matrix(logits.data(), T, E), {}, {}, scratch, routing,
                      table, weights);
    moe::builtin_gemm::forward<double>(exec, v.tokens, moe::stacked_view(v.down), {}, all,
                                       {latent.data(), T, W}, scratch);
    experts.forward<double>(exec, experts.prepare(v.experts), {latent.data(), T, W}, table, weights,
                            {mixed.data(), T, W}, saved, scratch);
    std::vector<double> out(T * M);
    moe::builtin_gemm::forward<double>(exec, {mixed.data(), T, W}, moe::stacked_view(v.up), {}, all,
                                       {out.data(), T, M}, scratch);
    return out;
  }

  std::vector<double> backward(std::vector<double> const& numbers,
                               std::vector<double> const& dout) {
    auto const v = of<double const>(numbers.data());
    std::vector<double> gradient(numbers.size());
    auto const d = of<double>(gradient.data());
    moe::all_rows const all(T);
    constant_matrix const dy(dout.data(), T, M), z(latent.data(), T, W);
    std::vector<double> dmixed(T * W), dlatent(T * W), dweights(T * K), dlogits(T * E);
    auto const how = moe::update::assign;
    moe::builtin_gemm::weight_gradient<double>(exec, {mixed.data(), T, W}, dy, all, how,
                                               moe::stacked_view(d.up), scratch);
    moe::builtin_gemm::input_gradient<double>(exec, dy, moe::stacked_view(v.up), all, how,
                                              {dmixed.data(), T, W}, scratch);
    experts.backward<double>(exec, experts.prepare(v.experts), {dmixed.data(), T, W}, z, table,
                             weights, saved, {dlatent.data(), T, W}, dweights, d.experts, how,
                             scratch);
    moe::apply_preset_backward(exec, preset, constant_matrix(logits.data(), T, E), routing, table,
                               dweights, 0, scratch, matrix(dlogits.data(), T, E));
    moe::builtin_gemm::weight_gradient<double>(exec, v.tokens, {dlatent.data(), T, W}, all, how,
                                               moe::stacked_view(d.down), scratch);
    moe::builtin_gemm::input_gradient<double>(
        exec, {dlatent.data(), T, W}, moe::stacked_view(v.down), all, how, d.tokens, scratch);
    moe::compute_logits_backward<double>(exec, v.tokens, v.router, 0, {}, {logits.data(), T, E},
                                         {dlogits.data(), T, E}, d.tokens, d.router, how, scratch);
    return gradient;
  }
};

double gelu(double u) {
  return u * 0.5 * std::erfc(-u / std::sqrt(2.0));
}

}  // namespace

TEST_CASE("composed/latent experts: projected before the exchange and back after it") {
  latent_layer layer;
  auto const numbers = normals(latent_layer::elements(), 4, 0, 0.7);
  auto const out = layer.forward(numbers);
  auto const v = latent_layer::of(numbers.data());
  constexpr auto T = latent_layer::T, M = latent_layer::M, W = latent_layer::W, H = latent_layer::H;
  for (std::int64_t t = 0; t < T; ++t) {
    std::vector<double> expected(at(M));
    for (int j = 0; j < 2; ++j) {
      std::int64_t const e = layer.routing.expert[t * 2 + j];
      std::vector<double> y(v.experts.down_bias.row(e), v.experts.down_bias.row(e) + W);
      for (std::int64_t h = 0; h < H; ++h) {
        double u = v.experts.up_bias(e, h);
        for (std::int64_t w = 0; w < W; ++w)
          for (std::int64_t m = 0; m < M; ++m)
            u += v.tokens(t, m) * v.down(m, w) * v.experts.up[e](w, h);
        for (std::int64_t w = 0; w < W; ++w) y[at(w)] += gelu(u) * v.experts.down[e](h, w);
      }
      for (std::int64_t m = 0; m < M; ++m)
        for (std::int64_t w = 0; w < W; ++w)
          expected[at(m)] += layer.routing.weight[t * 2 + j] * y[at(w)] * v.up(w, m);
    }
    for (std::int64_t m = 0; m < M; ++m)
      CHECK(out[at(t * M + m)] == doctest::Approx(expected[at(m)]));
  }
}

TEST_CASE("composed/latent experts: gradients of tokens and of every parameter") {
  latent_layer layer;
  auto const numbers = normals(latent_layer::elements(), 5, 0, 0.7);
  auto const dout = normals(latent_layer::T * latent_layer::M, 6);
  layer.forward(numbers);
  auto const found = layer.backward(numbers, dout);
  moe_test::check_gradient(
      [&](std::vector<double> const& x) {
        auto const out = layer.forward(x);
        double sum = 0;
        for (std::size_t i = 0; i < out.size(); ++i) sum += out[i] * dout[i];
        return sum;
      },
      numbers, found);
}

// --- a second grouping key --------------------------------------------------------------------------

TEST_CASE("composed/two keys: rows by expert and by adapter within it, one table for both") {
  // Expert e with the adapter of token t is group e * A + adapter[t]: rows of an expert stay together, for
  // its matrix, and those of one adapter within them, for the adapter's two.
  constexpr std::int64_t T = 40, M = 4, rank = 2;
  constexpr int E = 3, A = 3, K = 2;
  auto const logits = normals(T * E, 1), x = normals(T * M, 2);
  std::vector<int> adapter(T);
  for (int t = 0; t < T; ++t) adapter[at(t)] = t * 7 % 11 % A;
  using router = moe::gate<moe::softmax, moe::top_k<K>, moe::renormalised>;
  moe::cpu const exec;
  moe::buffer const scratch(1 << 20);
  moe::basic_routing_buffer<double> by_expert(T, K, E), by_both(T, K, E * A);
  moe::route(exec, router{}, moe::matrix_view(logits, T, E), {}, scratch, by_expert);
  for (std::int64_t i = 0; i < T * K; ++i) {
    by_both.expert[i] = by_expert.expert[i] * A + adapter[at(i / K)];
    by_both.weight[i] = by_expert.weight[i];
  }
  moe::table_buffer table({.T = T, .K = K, .E = E * A, .max_rows = T * K});
  moe::build_table(exec, by_both, {}, scratch, table);

  std::vector<double> rows(T * K * M), y(T * K * M), low(T * K * rank), out(T * M);
  moe::dispatch<double>(exec, {x.data(), T, M}, table, {rows.data(), T * K, M});
  std::vector<std::int32_t> begin, used;  // of experts: A groups that follow each other
  for (int e = 0; e < E; ++e) {
    begin.push_back(table.begin[e * A]);
    used.push_back(0);
    for (int a = 0; a < A; ++a) {
      CHECK(table.begin[e * A + a] == begin.back() + used.back());
      used.back() += table.used[e * A + a];
    }
  }
  auto const base = normals(E * M * M, 3), down = normals(E * A * M * rank, 4),
             up = normals(E * A * rank * M, 5);
  moe::row_segments const experts(E, begin.data(), used.data()), groups(table);
  moe::builtin_gemm::forward<double>(exec, {rows.data(), T * K, M}, {base.data(), E, M, M}, {},
                                     experts, {y.data(), T * K, M}, scratch);
  moe::builtin_gemm::forward<double>(exec, {rows.data(), T * K, M}, {down.data(), E * A, M, rank},
                                     {}, groups, {low.data(), T * K, rank}, scratch);
  std::vector<double> delta(y.size());
  moe::builtin_gemm::forward<double>(exec, {low.data(), T * K, rank}, {up.data(), E * A, rank, M},
                                     {}, groups, {delta.data(), T * K, M}, scratch);
  for (std::size_t i = 0; i < y.size(); ++i) y[i] += delta[i];
  moe::combine<double>(exec, {y.data(), T * K, M}, table,
                       moe::vector_view<double const>(by_both.weight, T * K), {x.data(), T, M},
                       {out.data(), T, M});
  for (std::int64_t t = 0; t < T; ++t)
    for (std::int64_t m = 0; m < M; ++m) {
      double expected = 0;
      for (int j = 0; j < K; ++j) {
        std::int64_t const e = by_expert.expert[t * K + j], g = e * A + adapter[at(t)];
        double one = 0;
        for (std::int64_t i = 0; i < M; ++i) {
          double w = base[at((e * M + i) * M + m)];
          for (std::int64_t r = 0; r < rank; ++r)
            w += down[at((g * M + i) * rank + r)] * up[at((g * rank + r) * M + m)];
          one += x[at(t * M + i)] * w;
        }
        expected += by_expert.weight[t * K + j] * one;
      }
      CHECK(out[at(t * M + m)] == doctest::Approx(expected));
    }
}

// --- ternary choices of experts ---------------------------------------------------------------------

namespace {

/// TC-MoE: each expert may be chosen with the sign + or -, and there is a choice of none. The router has
/// 2 E + 1 logits; ids are folded to experts before the table is built, signs go into the weights.
struct ternary {
  static constexpr int E = 3, K = 2, columns = 2 * E + 1;
  static constexpr std::int64_t T = 30, M = 4, H = 5;
  using router = moe::gate<moe::logit_bias<moe::softmax>, moe::top_k<K>, moe::as_scored>;

  // Against the choice of a sign or of none, as LibMoE has it; less here, so that all are met.
  float bias[columns] = {0, 0, 0, -0.25f, -0.25f, -0.25f, -0.5f};
  router gate{.score = {.bias = bias}};
  std::vector<double> x = normals(T * M, 1);
  std::vector<double> numbers = normals(moe::ffn_elements({E, M, H}, false, false), 5);
  moe::buffer scratch{1 << 20}, saved{1 << 20};
  moe::basic_routing_buffer<double> out{T, K, columns}, folded{T, K, E};
  moe::table_buffer table{{.T = T, .K = K, .E = E, .max_rows = T * K}};
  moe::ffn<moe::gelu> experts;

  static double sign(std::int32_t id) { return id < E ? 1 : id < 2 * E ? -1 : 0; }
  auto weights() { return moe::carve_ffn(numbers.data(), {E, M, H}, false, false); }

  std::vector<double> forward(std::vector<double> const& logits) {
    moe::cpu const exec;
    moe::route(exec, gate, moe::matrix_view(logits, T, columns), {}, scratch, out);
    for (std::int64_t i = 0; i < T * K; ++i) {
      std::int32_t const id = out.expert[i];
      folded.expert[i] = sign(id) == 0 ? std::int32_t{moe::no_candidate} : id % E;
      folded.weight[i] = sign(id) * out.weight[i];
    }
    moe::build_table(exec, folded, {}, scratch, table);
    std::vector<double> y(T * M);
    experts.forward<double>(exec, experts.prepare(weights()), {x.data(), T, M}, table,
                            moe::vector_view<double const>(folded.weight, T * K), {y.data(), T, M},
                            saved, scratch);
    return y;
  }
  /// dlogits, after a forward with the same.
  std::vector<double> backward(std::vector<double> const& logits, std::vector<double> const& dy) {
    moe::cpu const exec;
    std::vector<double> dx(T * M), dweight(T * K), dnumbers(numbers.size()), dlogits(logits.size());
    experts.backward<double>(exec, experts.prepare(weights()), {dy.data(), T, M}, {x.data(), T, M},
                             table, moe::vector_view<double const>(folded.weight, T * K), saved,
                             {dx.data(), T, M}, moe::vector_view<double>(dweight),
                             moe::carve_ffn(dnumbers.data(), {E, M, H}, false, false),
                             moe::update::assign, scratch);
    for (std::int64_t i = 0; i < T * K; ++i) dweight[at(i)] *= sign(out.expert[i]);
    moe::route_backward(exec, gate, moe::matrix_view(logits, T, columns), out,
                        moe::matrix_view(dweight, T, K), {}, scratch,
                        moe::matrix_view(dlogits, T, columns));
    return dlogits;
  }
};

}  // namespace

TEST_CASE("composed/ternary choices: experts with a sign, and none, against loops") {
  constexpr int E = ternary::E, K = ternary::K, columns = ternary::columns;
  constexpr std::int64_t T = ternary::T, M = ternary::M, H = ternary::H;
  ternary layer;
  auto const logits = normals(T * columns, 2);
  auto const y = layer.forward(logits);
  auto const w = layer.weights();
  int none = 0, negative = 0;
  for (std::int64_t t = 0; t < T; ++t) {
    double p[columns], total = 0;
    for (int i = 0; i < columns; ++i)
      total += p[i] = std::exp(logits[at(t * columns + i)] + double(layer.bias[i]));
    std::vector<double> expected(at(M));
    for (int j = 0; j < K; ++j) {
      auto const id = static_cast<int>(std::max_element(p, p + columns) - p);
      double const weight = ternary::sign(id) * p[id] / total;
      p[id] = -1;
      none += id == 2 * E;
      negative += id >= E && id < 2 * E;
      for (std::int64_t h = 0; h < H; ++h) {
        double u = 0;
        for (std::int64_t m = 0; m < M; ++m) u += layer.x[at(t * M + m)] * w.up[id % E](m, h);
        for (std::int64_t m = 0; m < M; ++m)
          expected[at(m)] += weight * layer.experts.act(u) * w.down[id % E](h, m);
      }
    }
    for (std::int64_t m = 0; m < M; ++m)
      CHECK(y[at(t * M + m)] == doctest::Approx(expected[at(m)]));
  }
  CHECK(none > 2);
  CHECK(negative > 5);
}

TEST_CASE("composed/ternary choices: the gradient of the logits") {
  ternary layer;
  auto const logits = normals(ternary::T * ternary::columns, 2),
             dy = normals(ternary::T * ternary::M, 3);
  layer.forward(logits);
  auto const dlogits = layer.backward(logits, dy);
  moe_test::check_gradient(
      [&](std::vector<double> const& l) {
        auto const y = layer.forward(l);
        double sum = 0;
        for (std::size_t i = 0; i < y.size(); ++i) sum += y[i] * dy[i];
        return sum;
      },
      logits, dlogits);
}

TEST_CASE("composed/importance: the weights of each expert, added up over batches") {
  moe::basic_routing_buffer<double> routing(4, 2, 3);
  double const weight[] = {0.5, 0.25, 1, 9, 9, 9, 0.125, 2};
  int const expert[] = {2, 0, 2, -1, 0, 1, 1, 7};
  for (int i = 0; i < 8; ++i) {
    routing.expert[i] = expert[i];
    routing.weight[i] = weight[i];
  }
  std::uint8_t const live[] = {1, 1, 0, 1};
  routing.tokens.live = live;
  std::vector<double> importance(3);
  moe::count_importance(routing, moe::vector_view(importance));
  CHECK(importance == std::vector<double>{0.25, 0.125, 1.5});
  moe::count_importance(routing, moe::vector_view(importance));
  CHECK(importance == std::vector<double>{0.5, 0.25, 3});
  std::vector<double> two(2);
  moe_test::says(moe_test::refusal([&] { moe::count_importance(routing, moe::vector_view(two)); }),
                 "count_importance: importance is [E]; got size = 2, E = 3");
}

// --- experts without matrices, and where weights apply ----------------------------------------------

TEST_CASE("composed/moe_plus_plus: constant, copy and zero experts, logits of the layer before") {
  constexpr std::int64_t T = 60, M = 4, H = 5;
  constexpr int computed = 3, E = computed + 2 + 2, K = 2;  // two constant ones, copy, zero
  auto const x = normals(T * M, 1), router = normals(M * E, 2), map = normals(E * E, 3, 0, 0.3),
             before = normals(T * E, 4);
  auto numbers = normals(moe::ffn_elements({computed, M, H}, false, false), 5);
  auto const select = normals(2 * 2 * M, 6), value = normals(2 * M, 7);
  moe::cpu const exec;
  moe::buffer const scratch(1 << 20), saved(1 << 20);

  // z = x W + z_before W_g.
  std::vector<double> logits(T * E), residual(T * E);
  moe::compute_logits<double>(exec, {x.data(), T, M}, {router.data(), M, E}, 0, {},
                              {logits.data(), T, E}, scratch);
  moe::compute_logits<double>(exec, {before.data(), T, E}, {map.data(), E, E}, 0, {},
                              {residual.data(), T, E}, scratch);
  for (std::size_t i = 0; i < logits.size(); ++i) logits[i] += residual[i];

  using kind = moe::expert_kind;
  kind const kinds[E] = {kind::computed, kind::computed, kind::computed, kind::constant,
                         kind::constant, kind::copy,     kind::zero};
  std::int32_t const first_physical[E + 1] = {0, 1, 2, 3, 3, 3, 3, 3}, physical[] = {0, 1, 2};
  moe::expert_map const experts_map{first_physical, physical, computed, nullptr, kinds};
  auto const preset = moe::moe_plus_plus({E});
  moe::basic_routing_buffer<double> routing(T, K, E);
  moe::table_buffer table(moe::preset_table_shape(preset, T, E, computed));
  std::vector<double> weights(T * K), out(T * M);
  moe::apply_preset(exec, preset, constant_matrix(logits.data(), T, E), {}, experts_map, scratch,
                    routing, table, weights);
  moe::ffn<moe::relu> const experts;
  auto const w = moe::carve_ffn(numbers.data(), {computed, M, H}, false, false);
  experts.forward<double>(exec, experts.prepare(moe::ffn_weights<double const>(w)),
                          {x.data(), T, M}, table, weights, {out.data(), T, M}, saved, scratch);
  moe::constant_experts<double const> const constants{
      computed, {select.data(), 2, 2, M}, {value.data(), 2, M}};
  moe::add_constant_experts<double>(exec, constants, {x.data(), T, M}, {routing.expert, T * K},
                                    table, weights, {out.data(), T, M});

  int zeros = 0, copies = 0, constant = 0;
  for (std::int64_t t = 0; t < T; ++t) {
    double z[E], p[E], total = 0, kept = 0;
    for (int e = 0; e < E; ++e) {
      z[e] = 0;
      for (std::int64_t m = 0; m < M; ++m) z[e] += x[at(t * M + m)] * router[at(m * E + e)];
      for (int i = 0; i < E; ++i) z[e] += before[at(t * E + i)] * map[at(i * E + e)];
      total += p[e] = std::exp(z[e]);
    }
    int const first = static_cast<int>(std::max_element(z, z + E) - z);
    z[first] = -1e300;
    int const chosen[] = {first, static_cast<int>(std::max_element(z, z + E) - z)};
    for (int const e : chosen) kept += e == E - 1 ? 0 : p[e] / total;
    std::vector<double> expected(at(M));
    double const* const own = x.data() + t * M;
    for (int const e : chosen) {
      double const weight = p[e] / total / kept;
      std::vector<double> y(at(M));
      if (kinds[e] == kind::computed)
        for (std::int64_t h = 0; h < H; ++h) {
          double u = 0;
          for (std::int64_t m = 0; m < M; ++m) u += own[m] * w.up[e](m, h);
          for (std::int64_t m = 0; m < M; ++m) y[at(m)] += std::max(u, 0.0) * w.down[e](h, m);
        }
      if (kinds[e] == kind::copy) y.assign(own, own + M);
      if (kinds[e] == kind::constant) {
        double l[2] = {};
        for (std::int64_t m = 0; m < M; ++m)
          for (int i = 0; i < 2; ++i) l[i] += own[m] * select[at(((e - computed) * 2 + i) * M + m)];
        double const a = std::exp(l[0]) / (std::exp(l[0]) + std::exp(l[1]));
        for (std::int64_t m = 0; m < M; ++m)
          y[at(m)] = a * own[m] + (1 - a) * value[at((e - computed) * M + m)];
      }
      zeros += kinds[e] == kind::zero ? 1 : 0;
      copies += kinds[e] == kind::copy ? 1 : 0;
      constant += kinds[e] == kind::constant ? 1 : 0;
      if (kinds[e] != kind::zero)
        for (std::int64_t m = 0; m < M; ++m) expected[at(m)] += weight * y[at(m)];
    }
    for (std::int64_t m = 0; m < M; ++m)
      CHECK(out[at(t * M + m)] == doctest::Approx(expected[at(m)]));
  }
  CHECK(zeros > 3);
  CHECK(copies > 3);
  CHECK(constant > 3);
  CHECK(table.counts->rows == T * K - zeros - copies - constant);
}

TEST_CASE("composed/longcat: identity experts take no row, and all weights are scaled") {
  constexpr std::int64_t T = 30, M = 3;
  constexpr int computed = 4, E = 6, K = 3;
  auto const logits = normals(T * E, 1), x = normals(T * M, 2);
  moe::expert_kind kinds[E] = {};
  kinds[4] = kinds[5] = moe::expert_kind::copy;
  std::int32_t const first_physical[E + 1] = {0, 1, 2, 3, 4, 4, 4}, physical[] = {0, 1, 2, 3};
  moe::expert_map const map{first_physical, physical, computed, nullptr, kinds};
  float const bias[E] = {0, 0.1f, -0.1f, 0, 0.2f, 0};
  auto const preset = moe::longcat({K, 6, bias});
  moe::cpu const exec;
  moe::buffer const scratch(1 << 20);
  moe::basic_routing_buffer<double> routing(T, K, E);
  moe::table_buffer table(moe::preset_table_shape(preset, T, E, computed));
  std::vector<double> weights(T * K), rows(T * K * M), out(T * M);
  moe::apply_preset(exec, preset, moe::matrix_view(logits, T, E), {}, map, scratch, routing, table,
                    weights);
  moe::dispatch<double>(exec, {x.data(), T, M}, table, {rows.data(), table.max_rows, M});
  for (double& r : rows) r *= -2;  // every computed expert gives -2 x
  moe::combine<double>(exec, {rows.data(), table.max_rows, M}, table,
                       moe::vector_view<double const>(weights), {x.data(), T, M},
                       {out.data(), T, M});
  std::int64_t used = 0;
  for (std::int64_t t = 0; t < T; ++t) {
    double total = 0, factor = 0;
    for (int e = 0; e < E; ++e) total += std::exp(logits[at(t * E + e)]);
    for (int j = 0; j < K; ++j) {
      int const e = routing.expert[t * K + j];
      used += e < computed ? 1 : 0;
      factor += 6 * std::exp(logits[at(t * E + e)]) / total * (e < computed ? -2 : 1);
    }
    for (std::int64_t m = 0; m < M; ++m)
      CHECK(out[at(t * M + m)] == doctest::Approx(factor * x[at(t * M + m)]));
  }
  CHECK(table.counts->rows == used);
  CHECK(used < T * K);
}

TEST_CASE(
    "composed/llama4: weights before experts that are not linear are not weights after them") {
  // One expert y = relu(x - 1), x = 4, logit 0: weight 1/2. Before: relu(2 - 1); after: relu(4 - 1) / 2.
  std::vector<double> values{1, 1, -1, 0};  // up, down, up_bias, down_bias
  moe::cpu const exec;
  auto const run = [&](auto const& preset, bool before) {
    moe::moe_layer const layer(preset, moe::ffn<moe::relu>{.weights_before = before},
                               {.T = 1, .M = 1, .H = 1, .E = 1, .bias = true});
    std::vector<double> parameters{0};  // router
    parameters.insert(parameters.end(), values.begin(), values.end());
    moe::buffer const bytes(layer.template saved_bytes<double>()),
        scratch(layer.template scratch_bytes<double>(exec));
    auto saved = layer.template carve_saved<double>(bytes);
    double const x = 4;
    double y = 0;
    layer.forward(exec, layer.carve(parameters.data()), constant_matrix(&x, 1, 1), {},
                  matrix(&y, 1, 1), saved, scratch);
    return y;
  };
  CHECK(run(moe::llama4(), true) == doctest::Approx(1));
  auto after = moe::llama4();
  after.apply = moe::weights_apply::after_experts;
  CHECK(run(after, false) == doctest::Approx(1.5));
}

TEST_CASE("composed/gpt_oss: the down bias is weighted, and once when experts are sliced") {
  // Two experts with nothing but down biases 10 and 20, equal weights: 15, in each number of slices.
  constexpr std::int64_t H = 6;
  std::vector<double> values(at(moe::ffn_elements({2, 1, H}, true, true)), 0.0);
  auto const w = moe::carve_ffn(values.data(), {2, 1, H}, true, true);
  w.down_bias(0, 0) = 10;
  w.down_bias(1, 0) = 20;
  auto const preset = moe::gpt_oss({2, nullptr});
  moe::cpu const exec;
  moe::buffer const scratch(1 << 20), saved(1 << 20);
  std::vector<double> const logits{3, 3}, x{1};
  std::vector<double> weights(2);
  moe::basic_routing_buffer<double> routing(1, 2, 2);
  moe::table_buffer table(moe::preset_table_shape(preset, 1, 2));
  moe::apply_preset(exec, preset, moe::matrix_view(logits, 1, 2), {}, {}, scratch, routing, table,
                    weights);
  moe::ffn<moe::clamped_swiglu> const experts;
  for (std::int64_t const slices : {1, 2, 3}) {
    double sum = 0;
    for (std::int64_t s = 0; s < slices; ++s) {
      moe::ffn_weights<double const> const part = moe::slice(w, s, slices);
      double y = 0;
      experts.forward<double>(exec, experts.prepare(part), {x.data(), 1, 1}, table, weights,
                              {&y, 1, 1}, saved, scratch);
      sum += y;
    }
    CHECK(sum == doctest::Approx(15));
  }
}
