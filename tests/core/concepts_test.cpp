// For each concept an archetype that has its requirements and nothing else, and for each
// requirement a type that lacks just that one.
#include <cstddef>
#include <doctest/doctest.h>
#include <limits>
#include <utility>
#include <vector>

#include <moe/core/concepts.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/scalar.hpp>
#include <moe/core/view.hpp>
#include <moe/expert/ffn.hpp>
#include <moe/gate/gate.hpp>

#include "support/laws.hpp"

namespace {

// scalar -------------------------------------------------------------------------------------------

static_assert(moe::scalar<float> && moe::scalar<double> && moe::scalar<moe::bf16> &&
              moe::scalar<moe::half>);
static_assert(!moe::scalar<int> && !moe::scalar<long double> && !moe::scalar<float const> &&
              !moe::scalar<float&>);

// contiguous_storage -------------------------------------------------------------------------------

struct storage {
  float values[3] = {1, 2, 3};
  float* data() { return values; }
  unsigned char size() { return 3; }
  storage() = default;
  storage(storage const&) = delete;
};
struct storage_without_data {
  int size();
};
struct storage_without_size {
  float* data();
};
struct storage_of_double {
  double* data();
  int size();
};
struct storage_with_iterator {
  struct iterator {
    operator float*() const;
  };
  iterator data();
  int size();
};
struct storage_of_strange_size {
  float* data();
  void* size();
};
static_assert(moe::contiguous_storage<storage, float>);
static_assert(moe::contiguous_storage<storage, float const>);
static_assert(!moe::contiguous_storage<storage const, float>);
static_assert(!moe::contiguous_storage<storage_without_data, float>);
static_assert(!moe::contiguous_storage<storage_without_size, float>);
static_assert(!moe::contiguous_storage<storage_of_double, float>);
static_assert(!moe::contiguous_storage<storage_with_iterator, float>);
static_assert(!moe::contiguous_storage<storage_of_strange_size, float>);
static_assert(!moe::contiguous_storage<float*, float>);

// worker_team --------------------------------------------------------------------------------------

struct team {
  signed char size() { return 2; }
  void run(void (*task)(void*, int), void* context) {
    std::exception_ptr failure;
    for (int member : {1, 0}) try {
        task(context, member);
      } catch (...) {
        failure = std::current_exception();
      }
    if (failure) std::rethrow_exception(failure);
  }
  team() = default;
  team(team const&) = delete;
};
struct team_without_size {
  void run(void (*)(void*, int), void*);
};
struct team_without_run {
  int size();
};
struct team_without_context {
  int size();
  void run(void (*)(void*, int));
};
static_assert(moe::worker_team<team>);
static_assert(!moe::worker_team<team_without_size>);
static_assert(!moe::worker_team<team_without_run>);
static_assert(!moe::worker_team<team_without_context>);
static_assert(!moe::worker_team<team const>);

// score_row ----------------------------------------------------------------------------------------

// A row that stores its scores backwards, to show that no policy or law reaches around the concept.
struct row {
  using value_type = double;
  std::vector<double> backwards;

  explicit row(std::vector<double> const& scores) : backwards(scores.rbegin(), scores.rend()) {}
  row(row&&) = default;
  row& operator=(row&&) = delete;

  int size() const { return static_cast<int>(backwards.size()); }
  template <class F>
  void transform(F const& f) {
    for (int e = 0; e < size(); ++e) cell(e) = f(e, at(e));
  }
  template <class F>
  void transform(row const& other, F const& f) {
    for (int e = 0; e < size(); ++e) cell(e) = f(e, at(e), other.at(e));
  }
  double max(int first, int last) const {
    double best = moe::no_score<double>;
    for (int e = first; e < last; ++e) best = at(e) > best ? at(e) : best;
    return best;
  }
  template <class F>
  double sum(F const& f) const {
    std::vector<double> const scores(backwards.rbegin(), backwards.rend());
    return moe_test::law_sum(scores, f, 32);
  }
  template <class F>
  double sum(row const& other, F const& f) const {
    return sum([&](int e, double s) { return f(e, s, other.at(e)); });
  }
  double at(int e) const { return backwards[backwards.size() - 1 - static_cast<std::size_t>(e)]; }
  void add(int e, double value) { cell(e) += value; }
  row copy() const { return row(std::vector<double>(backwards.rbegin(), backwards.rend())); }
  moe::choice<double> pop_max(int first, int last) {
    moe::choice<double> best{-1, moe::no_score<double>};
    for (int e = first; e < last; ++e)
      if (at(e) > best.key) best = {e, at(e)};
    if (best.expert >= 0) cell(best.expert) = moe::no_score<double>;
    return best;
  }

 private:
  double& cell(int e) { return backwards[backwards.size() - 1 - static_cast<std::size_t>(e)]; }
};
static_assert(moe::score_row<row>);

// Each near miss is a row with one member hidden or of another type. It copies as itself, so that it
// does not fail by its copy().
template <class Derived>
struct self_copying : row {
  Derived copy() const;
};
struct row_with_all : self_copying<row_with_all> {};
static_assert(moe::score_row<row_with_all>);
struct row_of_int : self_copying<row_of_int> {
  using value_type = int;
};
struct row_without_value_type : self_copying<row_without_value_type> {
  using value_type = void;
};
struct row_of_long_size : self_copying<row_of_long_size> {
  long size() const;
};
struct row_without_transform : self_copying<row_without_transform> {
  void transform();
};
struct row_without_transform_by_row : self_copying<row_without_transform_by_row> {
  template <class F>
  void transform(F const&);
};
struct row_with_transform_result : self_copying<row_with_transform_result> {
  template <class F>
  int transform(F const&);
  template <class F>
  void transform(row const&, F const&);
};
struct row_of_float_max : self_copying<row_of_float_max> {
  float max(int, int) const;
};
struct row_with_mutable_max : self_copying<row_with_mutable_max> {
  double max(int, int);
};
struct row_without_sum : self_copying<row_without_sum> {
  void sum();
};
struct row_without_sum_by_row : self_copying<row_without_sum_by_row> {
  template <class F>
  double sum(F const&) const;
};
struct row_at_reference : self_copying<row_at_reference> {
  double const& at(int) const;
};
struct row_without_add : self_copying<row_without_add> {
  void add();
};
struct row_copied_as_base : row {};  // its copy() gives a row
struct row_popping_int : self_copying<row_popping_int> {
  int pop_max(int, int);
};
static_assert(!moe::score_row<row_of_int>);
static_assert(!moe::score_row<row_without_value_type>);
static_assert(!moe::score_row<row_of_long_size>);
static_assert(!moe::score_row<row_without_transform>);
static_assert(!moe::score_row<row_without_transform_by_row>);
static_assert(!moe::score_row<row_with_transform_result>);
static_assert(!moe::score_row<row_of_float_max>);
static_assert(!moe::score_row<row_with_mutable_max>);
static_assert(!moe::score_row<row_without_sum>);
static_assert(!moe::score_row<row_without_sum_by_row>);
static_assert(!moe::score_row<row_at_reference>);
static_assert(!moe::score_row<row_without_add>);
static_assert(!moe::score_row<row_copied_as_base>);
static_assert(!moe::score_row<row_popping_int>);
static_assert(!moe::score_row<float*>);

struct row_without_copy : row {
  void copy();
};
static_assert(!moe::score_row<row_without_copy>);

// score_policy -------------------------------------------------------------------------------------

using float_row = moe::array_row<float>;

struct doubled {  // s = 2 l
  template <moe::score_row R>
  void operator()(R& r, moe::token const&) const {
    r.transform([](int, typename R::value_type l) { return 2 * l; });
  }
  template <moe::score_row R>
  void backward(R const& scores, R& grad, moe::token const&) const {
    using V = typename R::value_type;
    grad.transform(scores, [](int, V g, V s) { return moe::is_candidate(s) ? 2 * g : V(0); });
  }
};
struct score_without_backward {
  void operator()(float_row&, moe::token const&) const;
};
struct score_without_forward {
  void backward(float_row const&, float_row&, moe::token const&) const;
};
struct score_that_changes {
  void operator()(float_row&, moe::token const&);
  void backward(float_row const&, float_row&, moe::token const&) const;
};
struct score_that_answers {
  int operator()(float_row&, moe::token const&) const;
  void backward(float_row const&, float_row&, moe::token const&) const;
};
struct score_not_copyable {
  score_not_copyable(score_not_copyable const&) = delete;
  void operator()(float_row&, moe::token const&) const;
  void backward(float_row const&, float_row&, moe::token const&) const;
};
static_assert(moe::score_policy<doubled, float_row> && moe::score_policy<doubled, row>);
static_assert(!moe::score_policy<doubled, float*>);
static_assert(!moe::score_policy<score_without_backward, float_row>);
static_assert(!moe::score_policy<score_without_forward, float_row>);
static_assert(!moe::score_policy<score_that_changes, float_row>);
static_assert(!moe::score_policy<score_that_answers, float_row>);
static_assert(!moe::score_policy<score_not_copyable, float_row>);

// select_policy ------------------------------------------------------------------------------------

struct best_two {
  static constexpr int max_k = 2;
  int k() const { return 2; }
  template <moe::score_row R>
  void operator()(R& keys, moe::choices<2, typename R::value_type>& c, moe::token const&) const {
    c.k = 2;
    for (int j = 0; j < 2; ++j) c.expert[j] = keys.pop_max(0, keys.size()).expert;
  }
};
template <int MaxK>
struct select_of {
  static constexpr int max_k = MaxK;
  int k() const;
  template <class Chosen>
  void operator()(float_row&, Chosen&, moe::token const&) const;
};
struct select_without_max_k {
  int k() const;
  template <class Chosen>
  void operator()(float_row&, Chosen&, moe::token const&) const;
};
struct select_without_k {
  static constexpr int max_k = 2;
  template <class Chosen>
  void operator()(float_row&, Chosen&, moe::token const&) const;
};
struct select_of_long_k : select_of<2> {
  long k() const;
};
struct select_without_token {
  static constexpr int max_k = 2;
  int k() const;
  template <class Chosen>
  void operator()(float_row&, Chosen&) const;
};
struct select_not_copyable : select_of<2> {
  select_not_copyable(select_not_copyable const&) = delete;
};
static_assert(moe::select_policy<best_two, float_row> && moe::select_policy<best_two, row>);
static_assert(moe::select_policy<select_of<1>, float_row>);
static_assert(moe::select_policy<select_of<moe::max_choices>, float_row>);
static_assert(!moe::select_policy<select_of<0>, float_row>);
static_assert(!moe::select_policy<select_of<moe::max_choices + 1>, float_row>);
static_assert(!moe::select_policy<select_without_max_k, float_row>);
static_assert(!moe::select_policy<select_without_k, float_row>);
static_assert(!moe::select_policy<select_of_long_k, float_row>);
static_assert(!moe::select_policy<select_without_token, float_row>);
static_assert(!moe::select_policy<select_not_copyable, float_row>);
static_assert(!moe::select_policy<best_two, float*>);

// weigh_policy -------------------------------------------------------------------------------------

struct halved {  // w = s / 2
  template <moe::score_row R, int MaxK>
  void operator()(R const& scores, moe::choices<MaxK, typename R::value_type>& c) const {
    for (int j = 0; j < c.k; ++j) c.weight[j] = c.expert[j] < 0 ? 0 : scores.at(c.expert[j]) / 2;
  }
  template <moe::score_row R, int MaxK>
  void backward(R const&, moe::choices<MaxK, typename R::value_type> const& c,
                moe::choices<MaxK, typename R::value_type> const& dc, R& dscores) const {
    for (int j = 0; j < c.k; ++j)
      if (c.expert[j] >= 0) dscores.add(c.expert[j], dc.weight[j] / 2);
  }
};
using two = moe::choices<2, float>;
struct weigh_without_backward {
  void operator()(float_row const&, two&) const;
};
struct weigh_without_forward {
  void backward(float_row const&, two const&, two const&, float_row&) const;
};
struct weigh_that_changes_scores {
  void operator()(float_row&, two&) const;
  void backward(float_row const&, two const&, two const&, float_row&) const;
};
struct weigh_that_changes_choices {
  void operator()(float_row const&, two&) const;
  void backward(float_row const&, two&, two const&, float_row&) const;
};
struct weigh_not_copyable {
  weigh_not_copyable(weigh_not_copyable const&) = delete;
  void operator()(float_row const&, two&) const;
  void backward(float_row const&, two const&, two const&, float_row&) const;
};
static_assert(moe::weigh_policy<halved, float_row, 2> && moe::weigh_policy<halved, row, 5>);
static_assert(!moe::weigh_policy<halved, float*, 2>);
static_assert(!moe::weigh_policy<weigh_without_backward, float_row, 2>);
static_assert(!moe::weigh_policy<weigh_without_forward, float_row, 2>);
static_assert(!moe::weigh_policy<weigh_that_changes_scores, float_row, 2>);
static_assert(!moe::weigh_policy<weigh_that_changes_choices, float_row, 2>);
static_assert(!moe::weigh_policy<weigh_not_copyable, float_row, 2>);

// token_gate ---------------------------------------------------------------------------------------

struct whole_gate {  // not a composition: s = 2 l, the best two, w = s / 2
  static constexpr int max_k = 2;
  int k() const { return 2; }
  template <moe::score_row R>
  void operator()(R& r, moe::choices<2, typename R::value_type>& c, moe::token const& t) const {
    doubled{}(r, t);
    R keys = r.copy();
    best_two{}(keys, c, t);
    halved{}(std::as_const(r), c);
  }
  template <moe::score_row R>
  void backward(R const& scores, moe::choices<2, typename R::value_type> const& c,
                moe::choices<2, typename R::value_type> const& dc, R& dscores,
                moe::token const& t) const {
    halved{}.backward(scores, c, dc, dscores);
    doubled{}.backward(scores, dscores, t);
  }
};
template <int MaxK>
struct gate_of {
  static constexpr int max_k = MaxK;
  int k() const;
  template <class Chosen>
  void operator()(float_row&, Chosen&, moe::token const&) const;
  template <class Chosen>
  void backward(float_row const&, Chosen const&, Chosen const&, float_row&,
                moe::token const&) const;
};
struct gate_without_k : gate_of<2> {
  void k() const;
};
struct gate_without_forward : gate_of<2> {
  void operator()() const;
};
struct gate_without_backward : gate_of<2> {
  void backward() const;
};
struct gate_without_max_k {
  int k() const;
  template <class Chosen>
  void operator()(float_row&, Chosen&, moe::token const&) const;
  template <class Chosen>
  void backward(float_row const&, Chosen const&, Chosen const&, float_row&,
                moe::token const&) const;
};
struct gate_not_copyable : gate_of<2> {
  gate_not_copyable(gate_not_copyable const&) = delete;
};
using composed_gate = moe::gate<doubled, best_two, halved>;
static_assert(moe::token_gate<whole_gate, float_row> && moe::token_gate<whole_gate, row>);
static_assert(moe::token_gate<composed_gate, float_row> && moe::token_gate<composed_gate, row>);
static_assert(moe::token_gate<gate_of<2>, float_row>);
static_assert(!moe::token_gate<gate_of<0>, float_row>);
static_assert(!moe::token_gate<gate_of<moe::max_choices + 1>, float_row>);
static_assert(!moe::token_gate<gate_without_k, float_row>);
static_assert(!moe::token_gate<gate_without_forward, float_row>);
static_assert(!moe::token_gate<gate_without_backward, float_row>);
static_assert(!moe::token_gate<gate_without_max_k, float_row>);
static_assert(!moe::token_gate<gate_not_copyable, float_row>);
static_assert(!moe::token_gate<whole_gate, float*>);

// noise_source, overflow_rule ----------------------------------------------------------------------

struct noise {
  struct number {
    float value;
    operator float() const { return value; }
  };
  number operator()(moe::token const& t, int e) const {
    // Weyl's sequence: enough to tell the arguments apart.
    auto const x = 0.6180339887 * static_cast<double>(t.id) + 0.7548776662 * e +
                   0.5698402910 * static_cast<double>(t.seed) + 0.8191725134 * t.step;
    return {static_cast<float>(x - static_cast<double>(static_cast<long>(x)))};
  }
};
struct noise_that_changes {
  float operator()(moe::token const&, int);
};
struct noise_without_expert {
  float operator()(moe::token const&) const;
};
struct noise_of_pointers {
  void* operator()(moe::token const&, int) const;
};
struct noise_not_copyable {
  noise_not_copyable(noise_not_copyable const&) = delete;
  float operator()(moe::token const&, int) const;
};
static_assert(moe::noise_source<noise>);
static_assert(!moe::noise_source<noise_that_changes>);
static_assert(!moe::noise_source<noise_without_expert>);
static_assert(!moe::noise_source<noise_of_pointers>);
static_assert(!moe::noise_source<noise_not_copyable>);

struct some_pair {};
struct overflow {
  int operator()(some_pair const&) const;
  overflow() = default;
  overflow(overflow const&) = delete;
};
struct overflow_that_changes {
  float operator()(some_pair const&);
};
struct overflow_that_takes_mutable {
  float operator()(some_pair&) const;
};
struct overflow_without_answer {
  void operator()(some_pair const&) const;
};
static_assert(moe::overflow_rule<overflow, some_pair>);
static_assert(!moe::overflow_rule<overflow, int>);
static_assert(!moe::overflow_rule<overflow_that_changes, some_pair>);
static_assert(!moe::overflow_rule<overflow_that_takes_mutable, some_pair>);
static_assert(!moe::overflow_rule<overflow_without_answer, some_pair>);

// activation ---------------------------------------------------------------------------------------

struct square {
  static constexpr bool gated = false;
  template <class V>
  V operator()(V x) const {
    return x * x;
  }
  template <class V>
  V derivative(V x) const {
    return 2 * x;
  }
};
struct product {
  struct partial {  // not the library's; anything with these two members is right
    double gate, up;
  };
  static constexpr bool gated = true;
  float operator()(float gate, float up) const { return gate * up; }
  double operator()(double gate, double up) const { return gate * up; }
  partial derivative(double gate, double up) const { return {up, gate}; }
};
struct activation_without_gated {
  template <class V>
  V operator()(V) const;
  template <class V>
  V derivative(V) const;
};
struct activation_without_call : square {
  void operator()() const;
};
struct activation_without_derivative : square {
  void derivative() const;
};
struct activation_of_double_alone : square {
  double operator()(double) const;
};
struct activation_of_float_alone : square {
  float operator()(float) const;
};
struct activation_that_changes : square {
  template <class V>
  V operator()(V);
};
struct activation_not_copyable : square {
  activation_not_copyable(activation_not_copyable const&) = delete;
};
struct gated_of_one_argument : square {
  static constexpr bool gated = true;
};
struct plain_of_two_arguments : product {
  static constexpr bool gated = false;
};
struct gated_without_gate : product {
  struct partial {
    double up;
  };
  partial derivative(double, double) const;
};
struct gated_without_up : product {
  struct partial {
    double gate;
  };
  partial derivative(double, double) const;
};
static_assert(moe::activation<square> && moe::activation<product>);
static_assert(!moe::activation<activation_without_gated>);
static_assert(!moe::activation<activation_without_call>);
static_assert(!moe::activation<activation_without_derivative>);
static_assert(!moe::activation<activation_of_double_alone>);
static_assert(!moe::activation<activation_of_float_alone>);
static_assert(!moe::activation<activation_that_changes>);
static_assert(!moe::activation<activation_not_copyable>);
static_assert(!moe::activation<gated_of_one_argument>);
static_assert(!moe::activation<plain_of_two_arguments>);
static_assert(!moe::activation<gated_without_gate>);
static_assert(!moe::activation<gated_without_up>);

// gemm_provider ------------------------------------------------------------------------------------

struct loops {  // the definition of the three products
  template <class V>
  static unsigned scratch_bytes(moe::cpu const&, int) {
    return 0;
  }
  template <class V>
  static void forward(moe::cpu const&, moe::matrix_view<V const> a, moe::stacked_view<V const> b,
                      moe::matrix_view<V const> bias, moe::row_segments const& segments,
                      moe::matrix_view<V> c, moe::memory, moe::call_site) {
    each_row(segments, [&](int p, std::int64_t r) {
      for (std::int64_t j = 0; j < b.cols(); ++j) {
        c(r, j) = bias.absent() ? 0 : bias(p, j);
        for (std::int64_t i = 0; i < b.rows(); ++i) c(r, j) += a(r, i) * b[p](i, j);
      }
    });
  }
  template <class V>
  static void input_gradient(moe::cpu const&, moe::matrix_view<V const> dc,
                             moe::stacked_view<V const> b, moe::row_segments const& segments,
                             moe::update how, moe::matrix_view<V> da, moe::memory, moe::call_site) {
    each_row(segments, [&](int p, std::int64_t r) {
      for (std::int64_t i = 0; i < b.rows(); ++i) {
        if (how == moe::update::assign) da(r, i) = 0;
        for (std::int64_t j = 0; j < b.cols(); ++j) da(r, i) += dc(r, j) * b[p](i, j);
      }
    });
  }
  template <class V>
  static void weight_gradient(moe::cpu const&, moe::matrix_view<V const> a,
                              moe::matrix_view<V const> dc, moe::row_segments const& segments,
                              moe::update how, moe::stacked_view<V> db, moe::memory,
                              moe::call_site) {
    for (int p = 0; p < segments.experts; ++p)
      for (std::int64_t i = 0; i < db.rows(); ++i)
        for (std::int64_t j = 0; j < db.cols(); ++j)
          if (how == moe::update::assign) db[p](i, j) = 0;
    each_row(segments, [&](int p, std::int64_t r) {
      for (std::int64_t i = 0; i < db.rows(); ++i)
        for (std::int64_t j = 0; j < db.cols(); ++j) db[p](i, j) += a(r, i) * dc(r, j);
    });
  }

 private:
  template <class F>
  static void each_row(moe::row_segments const& segments, F const& f) {
    for (int p = 0; p < segments.experts; ++p) {
      moe::row_cursor rows(segments, p, 0);
      for (std::int64_t n = segments.rows(p); n > 0; --n) f(p, rows.next());
    }
  }
};
struct gemm_without_scratch_bytes : loops {
  void scratch_bytes();
};
struct gemm_of_strange_scratch : loops {
  template <class V>
  static void* scratch_bytes(moe::cpu const&, int);
};
struct gemm_without_forward : loops {
  void forward();
};
struct gemm_without_input_gradient : loops {
  void input_gradient();
};
struct gemm_without_weight_gradient : loops {
  void weight_gradient();
};
struct gemm_with_state : loops {
  template <class V, class... Args>
  void forward(Args const&...);  // not static
};
struct gemm_without_site : loops {
  template <class V>
  static void forward(moe::cpu const&, moe::matrix_view<V const>, moe::stacked_view<V const>,
                      moe::matrix_view<V const>, moe::row_segments const&, moe::matrix_view<V>,
                      moe::memory);
};
static_assert(moe::gemm_provider<loops, float> && moe::gemm_provider<loops, double>);
static_assert(!moe::gemm_provider<gemm_without_scratch_bytes, float>);
static_assert(!moe::gemm_provider<gemm_of_strange_scratch, float>);
static_assert(!moe::gemm_provider<gemm_without_forward, float>);
static_assert(!moe::gemm_provider<gemm_without_input_gradient, float>);
static_assert(!moe::gemm_provider<gemm_without_weight_gradient, float>);
static_assert(!moe::gemm_provider<gemm_with_state, float>);
static_assert(!moe::gemm_provider<gemm_without_site, float>);

// experts: see tests/layer/experts_test.cpp

/// Forward and backward of 7 rows of 3 experts, the second one idle: all results, one after another.
template <class Activation, class Gemm>
std::vector<double> run_experts() {
  moe::ffn<Activation, Gemm> const experts;
  moe::ffn_shape const shape{3, 4, 5};
  std::int32_t const begin[] = {0, 3, 3}, used[] = {3, 0, 4};
  moe::row_segments const segments(3, begin, used);
  auto const elements = static_cast<std::size_t>(moe::ffn_elements(shape, Activation::gated, true));
  std::vector<double> values(elements), gradients(elements), x(28), dout(28), y(28), dx(28);
  double next = 0.1;
  for (auto* part : {&values, &x, &dout})
    for (double& v : *part) v = (next = next < 1 ? next + 0.37 : next - 1.73);
  auto const handle =
      experts.prepare(moe::carve_ffn(values.data(), shape, Activation::gated, true));
  moe::cpu const exec;
  moe::buffer const saved(experts.template saved_bytes<double>(shape, 7));
  moe::buffer const scratch(experts.template forward_scratch_bytes<double>(exec, shape, 7) +
                            experts.template backward_scratch_bytes<double>(exec, shape, 7));
  experts.template forward_rows<double>(exec, handle, {x.data(), 7, 4}, segments, {y.data(), 7, 4},
                                        saved, scratch);
  experts.template backward_rows<double>(
      exec, handle, {dout.data(), 7, 4}, {}, {x.data(), 7, 4}, segments, saved, {dx.data(), 7, 4},
      {}, moe::carve_ffn(gradients.data(), shape, Activation::gated, true), moe::update::assign,
      scratch);
  y.insert(y.end(), dx.begin(), dx.end());
  y.insert(y.end(), gradients.begin(), gradients.end());
  return y;
}

}  // namespace

TEST_CASE("core/concepts: the archetypes of activations and products run experts") {
  auto const compare = [](std::vector<double> const& a, std::vector<double> const& b) {
    REQUIRE(a.size() == b.size());
    int nonzero = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      CHECK(a[i] == doctest::Approx(b[i]).epsilon(1e-12));
      nonzero += a[i] != 0;
    }
    CHECK(nonzero > 56);
  };
  compare(run_experts<square, loops>(), run_experts<square, moe::builtin_gemm>());
  compare(run_experts<product, loops>(), run_experts<product, moe::builtin_gemm>());
}

TEST_CASE("core/concepts: the archetype of a storage makes views") {
  storage s;
  CHECK(moe::vector_view<float>(s)[2] == 3);
  CHECK(moe::vector_view<float const>(s).size() == 3);
  CHECK(moe::matrix_view<float>(s, 1, 3)(0, 1) == 2);
}

TEST_CASE("core/concepts: the archetype of a team runs under the executor") {
  team t;
  moe_test::worker_team_laws(t);
  std::vector<int> seen(10, 0);
  moe::cpu(t).split(10, 1, [&](std::int64_t first, std::int64_t last, int) {
    for (auto i = first; i < last; ++i) ++seen[static_cast<std::size_t>(i)];
  });
  CHECK(seen == std::vector<int>(10, 1));
}

TEST_CASE("core/concepts: the archetype of a row obeys the laws and carries a gate") {
  moe_test::score_row_laws<row>([](std::vector<double> const& scores, int, auto&& f) {
    row r(scores);
    f(r);
  });
  row r({1, 4, 2});
  moe::choices<2, double> c;
  composed_gate{}(r, c, {});
  CHECK(c.expert[0] == 1);
  CHECK(c.weight[0] == 4);
  CHECK(c.expert[1] == 2);
  CHECK(r.at(0) == 2);
}

TEST_CASE("core/concepts: the archetypes of policies obey the laws, alone and composed") {
  moe_test::score_policy_laws(doubled{});
  moe_test::select_policy_laws(best_two{});
  moe_test::weigh_policy_laws(halved{});
  moe_test::token_gate_laws(whole_gate{});
  moe_test::token_gate_laws(composed_gate{});
}

TEST_CASE("core/concepts: the archetype of a noise source obeys the laws") {
  moe_test::noise_source_laws(noise{});
}
