// Every public concept: the library on one page.
// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/types.hpp>

namespace moe::inline MOE_ABI {

struct bf16;
struct half;
class cpu;
class memory;
struct routing_table;
struct ffn_shape;
struct row_segments;
enum class update : std::uint8_t;
class topology;
struct deadline;
struct outcome;
struct outgoing;
struct incoming;
template <class T>
class vector_view;
template <class T>
class matrix_view;
template <class T>
class stacked_view;

/// An element type of tokens, rows and parameters.
///
/// Syntax.    `static_cast<accumulate_t<T>>(x)` and `static_cast<T>(a)`, see core/scalar.hpp.
/// Semantics. The first is exact, the second rounds to nearest, ties to even.
/// Models.    float, double, `bf16`, `half`.
template <class T>
concept scalar = std::same_as<T, float> || std::same_as<T, double> || std::same_as<T, bf16> ||
                 std::same_as<T, half>;

namespace detail {

/// Unlike T*, this does not convert to that of a base class, which would step by another size.
template <class T>
using array_pointer = T (*)[];

}  // namespace detail

/// Storage whose elements lie one after another: what a view can be made from.
///
/// Syntax.    `s.data()` is a pointer to T, or to the non-const of it; `s.size()` is an integer.
/// Semantics. [data, data + size) are live elements as long as the storage is.
/// Cost.      O(1).
/// Models.    std::vector, std::array, std::span; a tensor class with data() and size().
template <class S, class T>
concept contiguous_storage = requires(S& s) {
  requires std::convertible_to<detail::array_pointer<std::remove_pointer_t<decltype(s.data())>>,
                               detail::array_pointer<T>>;
  { s.size() } -> std::convertible_to<std::size_t>;
};

/// A team of threads that runs one task at a time on all its members.
///
/// Syntax.    `t.size()`; `t.run(task, context)` with `void task(void* context, int member)`.
/// Semantics. Calls task once for every member in [0, size) and returns after the last has returned.
///            Members run concurrently where there are threads for them, so a task never waits for
///            another member. An exception of a member is rethrown by run, one of them if many.
///            Everything written before run is seen by the members, and theirs after it.
///            size() never changes.
/// Cost.      Creates no thread and allocates nothing.
/// Models.    `thread_team`, `openmp_team`.
template <class T>
concept worker_team = requires(T& t, void (*task)(void*, int), void* context) {
  { t.size() } -> std::convertible_to<int>;
  t.run(task, context);
};

namespace detail {

/// Stands for any elementwise function that a row is asked to apply: f(e, s) or f(e, s, other).
template <class V>
struct any_map {
  MOE_HOST_DEVICE V operator()(int, V s) const { return s; }
  MOE_HOST_DEVICE V operator()(int, V s, V) const { return s; }
};

/// Before `choices<P::max_k>` is formed, which refuses other values.
template <class P>
concept bounded_choices = requires { requires P::max_k >= 1 && P::max_k <= max_choices; };

}  // namespace detail

/// One token's E scores, touched by bulk operations only: no lane ids, no barriers, so that the same
/// policy runs on a plain array, on the registers of a warp, or on a whole block.
///
/// Syntax.    Below; `f` is a callable `V f(int e, V s)`, `g` a callable `V g(int e, V s, V o)`.
/// Semantics. A score of -inf is "not a candidate". r.transform(f): s[e] = f(e, s[e]);
///            r.transform(o, g): s[e] = g(e, s[e], o[e]). max(a, b) is over [a, b), -inf if empty.
///            sum(f) adds f(e, s[e]) over all e in an order that is fixed by E alone; the same for
///            sum(o, g). at(e) reads, add(e, v) adds to one element. copy() is an independent row.
///            pop_max(a, b) gives the best candidate of [a, b), ties to the lower id, and makes its
///            score -inf; expert = -1 if there is none.
///            A row may have what is faster for several experts, which policies use if it is there:
///            r.pop_best(k, ids), the ids of k calls of pop_max(0, size()), and c.read(k, ids, values).
/// Cost.      O(E), O(b - a) or O(1); no allocation.
/// Models.    `array_row<float>`, `array_row<double>`; `lane_row` in kernels.
template <class R>
concept score_row = requires(R& r, R const& c, detail::any_map<typename R::value_type> f,
                             typename R::value_type v, int e) {
  requires std::floating_point<typename R::value_type>;
  { c.size() } -> std::same_as<int>;
  { r.transform(f) } -> std::same_as<void>;
  { r.transform(c, f) } -> std::same_as<void>;
  { c.max(e, e) } -> std::same_as<typename R::value_type>;
  { c.sum(f) } -> std::same_as<typename R::value_type>;
  { c.sum(c, f) } -> std::same_as<typename R::value_type>;
  { c.at(e) } -> std::same_as<typename R::value_type>;
  { r.add(e, v) } -> std::same_as<void>;
  { c.copy() } -> std::same_as<R>;
  { r.pop_max(e, e) } -> std::same_as<choice<typename R::value_type>>;
};

/// A score policy turns one token's logits into scores, in place.
///
/// Syntax.    `p(row, token)`; `p.backward(scores, grad, token)`.
/// Semantics. Finite logits give finite scores, and -inf stays -inf: a row keeps its candidates.
///            backward turns grad from d/dscores into d/dlogits, given the scores that the forward
///            made; a score of -inf has gradient 0.
/// Cost.      O(E); no allocation beyond P::copies row copies in one call (0 if not declared).
/// Models.    `softmax`, `sigmoid`, `identity`, `sqrt_softplus`, `relu_normalised`; `noisy`,
///            `learned_noise` and `logit_bias` of another one.
template <class P, class R>
concept score_policy = score_row<R> && std::copyable<P> &&
                       requires(P const& p, R& row, R const& scores, token const& t) {
                         { p(row, t) } -> std::same_as<void>;
                         { p.backward(scores, row, t) } -> std::same_as<void>;
                       };

/// A select policy picks up to k experts of a row of keys, best first.
///
/// Syntax.    `P::max_k`, `p.k()`; `p(keys, choices, token)`.
/// Semantics. 1 <= k() <= max_k. Sets choices.k = k() and each choices.expert[j], j < k: an id in
///            [0, E), all different, or -1 where no live candidate was left or no more are wanted, and
///            these come last (but for ids that are given, which keep their places).
///            Keys may be destroyed. An expert whose key is -inf is never chosen. No gradient flows.
/// Cost.      O(E k); no allocation beyond P::copies row copies in one call (0 if not declared).
/// Models.    `top_k`, `top_p`, `replayed`, `by_table`, `by_hash`; `visible`, `visible_to`, `listed`,
///            `above`, `sampled`, `biased` and `group_limited` of another one.
template <class P, class R>
concept select_policy =
    score_row<R> && std::copyable<P> && detail::bounded_choices<P> &&
    requires(P const& p, R& keys, choices<P::max_k, typename R::value_type>& c, token const& t) {
      { p.k() } -> std::same_as<int>;
      { p(keys, c, t) } -> std::same_as<void>;
    };

/// A weigh policy gives the chosen experts their weights.
///
/// Syntax.    `p(scores, choices)`; `p.backward(scores, choices, dchoices, dscores)`.
/// Semantics. Sets choices.weight[j] for j < k; 0 where expert[j] < 0. backward adds d/dscores into
///            dscores, given the choices that the forward made and dchoices.weight = d/dweight.
/// Cost.      O(k); no allocation.
/// Models.    `as_scored`, `renormalised`, `softmax_of_selected`, `constant_weight`; `scaled` and
///            `without` of another one.
template <class P, class R, int MaxK>
concept weigh_policy =
    score_row<R> && std::copyable<P> &&
    requires(P const& p, R const& scores, R& dscores, choices<MaxK, typename R::value_type>& c,
             choices<MaxK, typename R::value_type> const& dc) {
      { p(scores, c) } -> std::same_as<void>;
      { p.backward(scores, dc, dc, dscores) } -> std::same_as<void>;
    };

/// A token-choice gate: a small copyable value that sends one token to at most k of E experts.
///
/// Syntax.    `G::max_k`, `g.k()`; `g(row, choices, token)`; `g.backward(scores, c, dc, dscores, token)`.
/// Semantics. g turns the row of logits into scores in place and fills choices as a select and a
///            weigh policy do. backward is given those scores, the choices, d/dweight in dc.weight
///            and in dscores the gradient that reaches the scores directly (from a loss; else 0),
///            and leaves d/dlogits in dscores.
/// Cost.      O(E k); G::copies row copies in one call (at most 2 if not declared).
/// Models.    `gate<Score, Select, Weigh>`.
template <class G, class R>
concept token_gate =
    score_row<R> && std::copyable<G> && detail::bounded_choices<G> &&
    requires(G const& g, R& row, R const& scores, choices<G::max_k, typename R::value_type>& c,
             choices<G::max_k, typename R::value_type> const& dc, token const& t) {
      { g.k() } -> std::same_as<int>;
      { g(row, c, t) } -> std::same_as<void>;
      { g.backward(scores, dc, dc, row, t) } -> std::same_as<void>;
    };

/// A source of noise: a number for each (token, expert).
///
/// Syntax.    `n(token, e)` converts to float.
/// Semantics. A function of its arguments alone, so that results do not depend on threads or ranks.
/// Cost.      O(1).
/// Models.    `uniform_noise`, `gumbel_noise`, `normal_noise`.
template <class N>
concept noise_source = std::copyable<N> && requires(N const& n, token const& t, int e) {
  { n(t, e) } -> std::convertible_to<float>;
};

/// An overflow rule of a user: the priority of a (token, choice) pair at an expert that is full.
///
/// Syntax.    `o(pair)` converts to float; `pair` is a `routed_pair`.
/// Semantics. An expert keeps the pairs of highest priority, ties to the lower rank; NaN counts as
///            -inf. A function of the pair alone.
/// Cost.      O(1); called once for each pair.
/// Models.    any lambda float(routed_pair const&).
template <class O, class Pair>
concept overflow_rule = requires(O const& o, Pair const& pair) {
  { o(pair) } -> std::convertible_to<float>;
};

/// What stands between the two projections of an expert, elementwise.
///
/// Syntax.    `A::gated` is a bool constant. Not gated: `a(x)`, `a.derivative(x)`. Gated: `a(gate, up)`,
///            and `a.derivative(gate, up)` has members gate and up. float and double.
/// Semantics. A function of its arguments and of a's members alone; NaN stays NaN.
/// Cost.      O(1), without branches.
/// Models.    `relu`, `silu`, `gelu`, `gelu_tanh`, `swiglu`, `geglu`, `geglu_tanh`, `clamped_swiglu`.
template <class A>
concept activation = std::copyable<A> && requires {
  { A::gated } -> std::convertible_to<bool>;
} && ((A::gated && requires(A const& a, float x, double y) {
                       { a(x, x) } -> std::same_as<float>;
                       { a(y, y) } -> std::same_as<double>;
                       { a.derivative(x, x).gate } -> std::convertible_to<float>;
                       { a.derivative(x, x).up } -> std::convertible_to<float>;
                     }) || (!A::gated && requires(A const& a, float x, double y) {
                       { a(x) } -> std::same_as<float>;
                       { a(y) } -> std::same_as<double>;
                       { a.derivative(x) } -> std::same_as<float>;
                     }));

/// The grouped products that experts are made of; see `builtin_gemm` for what each computes.
///
/// Syntax.    Static functions, below; `a`, `c` rows [N,in], [N,out], `b` weights [P,in,out].
///            The last argument is the caller's `call_site`, for the text of errors.
/// Semantics. c[r] = a[r] b[p] + bias[p]; da[r] (+)= dc[r] b[p]^T; db[p] (+)= the sum of a[r]^T dc[r].
///            Rows outside the segments are neither read nor written. An expert without rows has
///            gradient 0. The same bits for any number of threads.
/// Cost.      2 N in out operations each; allocates nothing: scratch_bytes(exec, P) from the caller.
/// Models.    `builtin_gemm`, `cblas_gemm`.
template <class G, class V>
concept gemm_provider = requires(cpu const& exec, matrix_view<V const> a, stacked_view<V const> b,
                                 matrix_view<V> c, stacked_view<V> db, row_segments const& segments,
                                 update how, memory scratch, int P, call_site site) {
  { G::template scratch_bytes<V>(exec, P) } -> std::convertible_to<std::size_t>;
  G::template forward<V>(exec, a, b, a, segments, c, scratch, site);
  G::template input_gradient<V>(exec, a, b, segments, how, c, scratch, site);
  G::template weight_gradient<V>(exec, a, a, segments, how, db, scratch, site);
};

/// All experts of a layer: the seam behind which weights may be packed and stages fused.
///
/// Syntax.    Below. `X::template parameters<V>` is a set of views on the caller's parameters or
///            gradients; `x.prepare(values, site)` gives a handle, which the next argument lists pass
///            on. `shape` is an `ffn_shape`: P experts of model width M, and an H that is X's to
///            interpret, as is `bias`. `x.weights_before`, if there is one, is a bool. The last
///            argument is the caller's `call_site`, for the text of errors.
/// Semantics. carve lays the parameters out in parameter_elements(shape, bias) elements. forward sets
///            out[t] to the weighted sum of what t's experts give, and keeps in `saved` what
///            backward needs: saved_bytes for tables of up to n rows. Weights multiply what goes into
///            an expert if weights_before is there and true, else what comes out. backward gives
///            dtokens and dweight and assigns to or adds to the gradients; called with what forward
///            was called with. A handle never runs with values that are no longer those of its
///            parameters: it reads them where they lie, or throws precondition_error.
/// Cost.      Allocates nothing.
/// Models.    `ffn<Activation, Gemm>`, `packed_ffn<Activation, W>`. `parallel_experts`, `gathered_experts`.
template <class X, class V>
concept experts =
    std::copyable<X> &&
    std::convertible_to<typename X::template parameters<V>,
                        typename X::template parameters<V const>> &&
    requires(X const& x, cpu const& exec, typename X::template parameters<V const> values,
             typename X::template parameters<V> gradients, matrix_view<V const> tokens,
             routing_table const& table, vector_view<V const> weight, matrix_view<V> out,
             vector_view<V> dweight, memory saved, memory scratch, update how,
             ffn_shape const& shape, V* data, bool bias, std::int64_t n, call_site site) {
      { x.parameter_elements(shape, bias) } -> std::same_as<std::int64_t>;
      { x.carve(data, shape, bias) } -> std::same_as<typename X::template parameters<V>>;
      { x.template saved_bytes<V>(shape, n) } -> std::same_as<std::size_t>;
      { x.template forward_scratch_bytes<V>(exec, shape, n) } -> std::same_as<std::size_t>;
      { x.template backward_scratch_bytes<V>(exec, shape, n) } -> std::same_as<std::size_t>;
      x.forward(exec, x.prepare(values, site), tokens, table, weight, out, saved, scratch, site);
      x.backward(exec, x.prepare(values, site), tokens, tokens, table, weight, saved, out, dweight,
                 gradients, how, scratch, site);
    };

/// Experts that also run on rows which the caller moves: for exchanges between ranks, for hooks that
/// see the rows, and for an expert that every token goes through.
///
/// Syntax.    `x.forward_rows`, `x.backward_rows`, below; `segments` says whose each row is.
/// Semantics. out[r] is what the expert of row r makes of rows[r], without weights. backward_rows
///            is its gradient, of out[r] times row_weight[r] if that is not empty. Rows outside the
///            segments are neither read nor written. `saved` and `scratch` as for tables of n rows.
/// Models.    `ffn<Activation, Gemm>`, `packed_ffn<Activation, W>`.
template <class X, class V>
concept row_experts =
    experts<X, V> &&
    requires(X const& x, cpu const& exec, typename X::template parameters<V const> values,
             typename X::template parameters<V> gradients, matrix_view<V const> rows,
             row_segments const& segments, vector_view<V const> row_weight, matrix_view<V> out,
             vector_view<V> drow_weight, memory saved, memory scratch, update how, call_site site) {
      x.forward_rows(exec, x.prepare(values, site), rows, segments, out, saved, scratch, site);
      x.backward_rows(exec, x.prepare(values, site), rows, row_weight, rows, segments, saved, out,
                      drow_weight, gradients, how, scratch, site);
    };

/// The way that rows take from their source to their destination, from which `make_plan` makes plans.
///
/// Syntax.    `p.hops()`, at least 1; `p.holder(ranks, hop, source, destination)`, called for
///            1 <= hop < hops() and source != destination.
/// Semantics. The rank that holds the rows after that hop. Before the first it is the source, after
///            the last the destination. All are indices into the topology. A pure function, so that
///            all ranks make plans that fit.
/// Cost.      Called R^2 hops times for each plan.
/// Models.    `flat`, `two_hop`, `leader`, `grid`.
template <class P>
concept exchange_path = requires(P const& p, topology const& ranks, int i) {
  { p.hops() } -> std::same_as<int>;
  { p.holder(ranks, i, i, i) } -> std::same_as<int>;
};

/// One of R ranks that exchange bytes.
///
/// Syntax.    `typename C::memory_space`, where the bytes lie (`host_memory`); `typename C::ticket`,
///            which is default-constructible and lives until its exchange has ended.
/// Semantics. exchange starts all sends and receives of a group and returns; their bytes belong to the
///            communicator until poll, which never blocks, says `ok`, or until abort. Message i from
///            a to b meets receive i of b from a, over all exchanges in the order they were started,
///            and has to have its length. A rank may have several exchanges under way. `pending` and
///            failures name a peer. split is collective: ranks of equal colour >= 0 become a
///            communicator, ordered by key and then by rank. abort is local, may be called again, ends
///            what is under way here, and makes later calls fail at once, here and, as a failure that
///            names this rank, at peers that wait for it.
/// Models.    `self_communicator`, `thread_communicator`, `mpi_communicator`, `nccl_communicator`.
template <class C>
concept communicator = requires(C& c, C const& k, vector_view<outgoing const> sends,
                                vector_view<incoming const> receives, typename C::ticket& ticket,
                                deadline until, C& child, int i) {
  typename C::memory_space;
  { k.rank() } noexcept -> std::same_as<int>;
  { k.size() } noexcept -> std::same_as<int>;
  { c.exchange(sends, receives, ticket) } -> std::same_as<outcome>;
  { c.poll(ticket) } -> std::same_as<outcome>;
  { c.split(i, i, until, child) } -> std::same_as<outcome>;
  { c.abort() } noexcept;
};

/// A communicator of devices, whose exchanges are work on a stream.
///
/// Syntax.    Below. `C::stream_ordered` is true; pointers are to memory of the device.
/// Semantics. poll's `ok` means that the exchange has been enqueued: work that is enqueued on the same
///            stream afterwards sees what was received, and may overwrite what was sent. Nothing has
///            to have arrived. copy enqueues a copy between memory of the device and of the host, or
///            within either, after all exchanges that were started; copies of pageable memory may wait
///            for what the stream has before them. wait_for_stream ends when the device has done
///            everything that was enqueued, or at the deadline, or with what failed; then the
///            communicator has aborted.
/// Cost.      But for those copies, only wait_for_stream waits for the device.
/// Models.    `nccl_communicator`.
template <class C>
concept stream_communicator =
    communicator<C> &&
    requires(C& c, std::byte* to, std::byte const* from, std::size_t bytes, deadline until) {
      requires C::stream_ordered;
      { c.copy(to, from, bytes) } -> std::same_as<outcome>;
      { c.wait_for_stream(until) } -> std::same_as<outcome>;
    };

}  // namespace moe::inline MOE_ABI
