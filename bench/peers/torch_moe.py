"""What users of PyTorch have for the stages of a MoE layer around the experts, timed as moe's are.

Eager softmax + topk, argsort + index for the table and the movement, and torch.compile of the same. Results are compared with
one another before anything is timed. Times are of CUDA graph replays, kernels only, inputs rotated past the L2 cache;
prints one line for each: stage, configuration, T, routing, variant, microseconds, GB/s of the bytes that have to move, and
the part of the copy bandwidth measured in the same run.

    python3 bench/peers/torch_moe.py [--quick]
"""

import statistics
import sys

import torch

CONFIGURATIONS = {  # name: (E, K, M)
    "mixtral": (8, 2, 4096),
    "deepseek_v3": (256, 8, 7168),
    "qwen3_30b": (128, 8, 2048),
}
TOKENS = (1, 8, 32, 128, 512, 4096, 16384)
CACHE_BYTES = 60 << 20


def gate(logits, k):
    weights, experts = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), experts


def table(experts, num_experts):
    """Pairs by expert, stable; the row of each pair; rows per expert."""
    order = torch.argsort(experts.flatten(), stable=True)
    row_of = torch.empty_like(order)
    row_of[order] = torch.arange(order.numel(), device=order.device)
    return order, row_of, torch.bincount(experts.flatten(), minlength=num_experts)


def dispatch(tokens, order, k):
    return tokens[order // k]


def combine(rows, row_of, weights):
    k = weights.shape[1]
    gathered = rows[row_of].view(-1, k, rows.shape[1])
    return (gathered.float() * weights.unsqueeze(-1)).sum(1).to(rows.dtype)


def replay_microseconds(functions, repeats):
    """The median time of one of `functions`, which do the same with other buffers, replayed as graphs."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for f in functions:
            for _ in range(3):
                f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for f in functions:
            f()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(functions))
    return statistics.median(times)


def eager_microseconds(functions, repeats):
    """For what cannot be captured: bincount and others that wait for the device."""
    for f in functions:
        f()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for f in functions:
            f()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(functions))
    return statistics.median(times)


def microseconds(functions, repeats):
    try:
        return replay_microseconds(functions, repeats), "graph"
    except RuntimeError:
        torch.cuda.synchronize()
        return eager_microseconds(functions, repeats), "eager"


def copy_bandwidth(repeats):
    source = torch.randn(1 << 29, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    us, _ = microseconds([lambda: target.copy_(source)], repeats)
    return 2 * source.numel() * 4 / us * 1e-3  # GB/s


def logits_of(kind, T, E):
    logits = torch.randn(T, E, device="cuda")
    if kind == "zipf":
        logits += torch.log(1.0 / torch.arange(1, E + 1, device="cuda") ** 1.0)
    return logits


def main():
    quick = "--quick" in sys.argv
    torch.manual_seed(1)
    repeats = 5 if quick else 30
    roof = copy_bandwidth(repeats)
    print(f"copy GB/s {roof:.0f} torch {torch.__version__} {torch.cuda.get_device_name()}")
    compiled = {f.__name__: torch.compile(f, dynamic=False) for f in (gate, table, dispatch, combine)}
    torch._dynamo.config.cache_size_limit = 1000

    def measure(stage, name, T, kind, inputs, arguments, moved):
        expected = globals()[stage](*arguments[0])
        found = compiled[stage](*arguments[0])
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (expected, found))):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        for variant, function in (("eager_ops", globals()[stage]), ("compiled", compiled[stage])):
            us, how = microseconds([lambda a=a: function(*a) for a in arguments], repeats)
            rate = moved / us * 1e-3
            print(f"{stage}/{name}/T:{T}/{kind} {variant} {how} us {us:.2f} GB/s {rate:.0f} "
                  f"% {100 * rate / roof:.1f}")

    for name, (E, K, M) in CONFIGURATIONS.items():
        for T in TOKENS[:4] if quick else TOKENS:
            for kind in ("uniform", "zipf"):
                sets = max(1, min(16, CACHE_BYTES * 2 // (T * M * 2 * (K + 1))))
                logits = [logits_of(kind, T, E) for _ in range(sets)]
                chosen = [gate(l, K) for l in logits]
                tables = [table(e, E) for _, e in chosen]
                tokens = [torch.randn(T, M, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
                rows = [torch.randn(T * K, M, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
                pairs = T * K
                measure("gate", name, T, kind, logits, [(l, K) for l in logits], T * E * 4 + pairs * 12)
                measure("table", name, T, kind, chosen, [(e, E) for _, e in chosen], pairs * 24)
                measure("dispatch", name, T, kind, tokens,
                        [(x, o, K) for x, (o, _, _) in zip(tokens, tables)], (1 + K) * T * M * 2)
                measure("combine", name, T, kind, rows,
                        [(r, t[1], w) for r, t, (w, _) in zip(rows, tables, chosen)], (1 + K) * T * M * 2)


if __name__ == "__main__":
    main()
