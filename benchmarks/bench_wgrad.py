"""Weight gradients straight into float32: GEMMs and embeddings, with their peers.

    python benchmarks/bench_wgrad.py --json benchmarks/results/wgrad_h200.json

    Linear     main[o, i] += sum over t of dy[t, o] * x[t, i]       (or =: the store form)
    embedding  main[v]    += sum of dy[t] over the t with indices[t] == v

Every way is checked against float64 before it is timed. Memory is cold, and launches cost nothing:
CUDA graphs of several calls, whose buffers take turns (see timing.py).

The floor of a call is the larger of its arithmetic at the fastest matmul of the run and its bytes
at the bandwidth of a copy of the same run. Bytes are the fewest that can be moved: inputs read
once, the sum read and written, or written alone.

On the CPU the shapes are a toy's: a check of the code, not a measurement.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import report
import torch
from environment import environment
from timing import (
    Timing,
    capture,
    release,
    rotation,
    sample_wall,
    time_cpu,
    time_cuda,
    time_replays,
    wall_timing,
)
from torch import Tensor

from gradacc_kernels import dispatch, ops

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
SHAPES = {
    "cuda": [(512, 2048), (2048, 2048), (8192, 2048), (4096, 4096), (14336, 4096), (128256, 2048)],
    "cpu": [(48, 64), (96, 32)],
}
TOKENS = {"cuda": [2**k for k in range(6, 15)], "cpu": [8, 32]}
QUICK_TOKENS = [256, 512, 1024, 4096]
FP16 = {"cuda": [((4096, 4096), [256, 1024, 4096])], "cpu": [((48, 64), [8])]}
TABLE = {"cuda": (128256, 2048), "cpu": (128, 32)}
LOOKUPS = {"cuda": [256, 512, 1024, 2048, 4096, 8192], "cpu": [32]}
QUICK_LOOKUPS = [1024, 4096]
BACKENDS = {"cuda": ["cuda", "triton"], "cpu": ["cpu"]}
CALIBRATION = {"cuda": (8192, 1 << 28), "cpu": (256, 1 << 20)}
GRAPH_US = 5000  # of calls share the launch of a graph
PIECE = 1 << 26  # elements that are checked at a time

# Truncated sums of a tensor core add up to a bias of a few 1e-5; a 16-bit sum is off by 1e-3, and
# one term of 16384 left out by 8e-3.
RELATIVE_L2 = 3e-4


@dataclass(frozen=True)
class Way:
    """One way to compute a gradient.

    Attributes:
        name: for the tables.
        backend: one of ours, or "torch".
        kind: "add" into float32, "store" into float32, or "16-bit": a store of 16-bit numbers.
        run: does it to a set of buffers.
        partials: writes statistics slots too.
        is_rounded: rounds to 16 bits on the way.
        most_sets: of buffers; fewer for a way that leaves nothing in the caches by itself.
    """

    name: str
    backend: str
    kind: str
    run: Callable[[Linear | Embedding], object]
    partials: bool = False
    is_rounded: bool = False
    most_sets: int = 64


# Linear

SCALED = "wgrad_accumulate_, inv_scale"


class Linear:
    """One set of random tensors of a GEMM.

    Attributes:
        main: float32 [O, I].
        dy, x: of the case's dtype, [T, O] and [T, I].
        half: of that dtype, [O, I].
        slots: statistics slots of main.
        one: a factor that only the device knows.
    """

    def __init__(self, shape: tuple[int, int], n_tokens: int, dtype: torch.dtype, device):
        (n_out, n_in) = shape
        self.main = torch.randn(shape, device=device)
        self.dy = torch.randn((n_tokens, n_out), dtype=dtype, device=device)
        self.x = torch.randn((n_tokens, n_in), dtype=dtype, device=device)
        self.half = torch.empty(shape, dtype=dtype, device=device)
        self.slots = torch.zeros(ops.num_chunks(n_out * n_in), device=device)
        self.one = torch.ones((), device=device)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Returns what may be written: the float32 and the 16-bit result."""
        return self.main, self.half


def linear_bytes(shape: tuple[int, int], n_tokens: int, kind: str) -> int:
    """Returns the fewest bytes that a call moves, with 16-bit inputs."""
    n_out, n_in = shape
    return {"add": 8, "store": 4, "16-bit": 2}[kind] * n_out * n_in + 2 * n_tokens * (n_out + n_in)


def wgrad(b: Linear, *, backend: str, store: bool, partials: bool) -> None:
    """Calls ours."""
    slots = b.slots if partials else None
    ops.wgrad_accumulate_(b.main, b.dy, b.x, store=store, partials=slots, backend=backend)


def wgrad_scaled(b: Linear, *, backend: str, store: bool) -> None:
    """Calls ours with a factor of the device, as a loss scale has it."""
    ops.wgrad_accumulate_(b.main, b.dy, b.x, inv_scale=b.one, store=store, backend=backend)


def addmm(b: Linear) -> None:
    """Adds by torch.addmm: cuBLAS with beta = 1 on a GPU."""
    if b.main.is_cuda:
        torch.addmm(b.main, b.dy.t(), b.x, out_dtype=torch.float32, out=b.main)
    else:
        b.main.addmm_(b.dy.t().float(), b.x.float())


def mm32(b: Linear) -> None:
    """Stores in float32 by torch.mm."""
    if b.main.is_cuda:
        torch.mm(b.dy.t(), b.x, out_dtype=torch.float32, out=b.main)
    else:
        torch.mm(b.dy.t().float(), b.x.float(), out=b.main)


def mm16(b: Linear) -> None:
    """Stores in 16 bits, as autograd does: no sum at all."""
    torch.mm(b.dy.t(), b.x, out=b.half)


def mm16_and_accumulate(b: Linear, *, backend: str) -> None:
    """Stores in 16 bits, then adds in a pass of its own: what the hook does without fusion."""
    mm16(b)
    ops.accumulate_(b.main, b.half, partials=b.slots, backend=backend)


def linear_ways(backends: Sequence[str]) -> list[Way]:
    """Returns the ways; the peers of the default backend next to it, for the clocks' sake."""
    peers = [
        Way("addmm, beta=1", "torch", "add", addmm),
        Way("mm, fp32 out", "torch", "store", mm32),
        Way("mm, 16-bit out", "torch", "16-bit", mm16, is_rounded=True),
    ]
    ways = []
    for backend in backends:
        for kind in ("add", "store"):
            for partials in (False, True):
                run = partial(wgrad, backend=backend, store=kind == "store", partials=partials)
                ways.append(Way("wgrad_accumulate_", backend, kind, run, partials))
        if peers:
            for kind in ("add", "store"):
                run = partial(wgrad_scaled, backend=backend, store=kind == "store")
                ways.append(Way(SCALED, backend, kind, run))
        ways += peers
        peers = []
    two_passes = partial(mm16_and_accumulate, backend=backends[0])
    name = "mm, 16-bit out + accumulate_"
    return [*ways, Way(name, backends[0], "add", two_passes, partials=True, is_rounded=True)]


def linear_exact(b: Linear) -> tuple[Tensor, Tensor]:
    """Returns dy^T x and |dy|^T |x| in float64, the second in float32."""
    dy, x = b.dy.t().double(), b.x.double()
    return dy @ x, (dy.abs() @ x.abs()).float()


# Embedding


class Embedding:
    """One set of random tensors of a look-up; the table's gradient is shared by all sets.

    Attributes:
        main: float32 [V, D].
        half: 16-bit [V, D], written by the peers' own operators only.
        indices: int64 [T].
        dy: of the case's dtype, [T, D].
        slots: statistics slots of main.
    """

    def __init__(self, main: Tensor, slots: Tensor, indices: Tensor, dtype: torch.dtype):
        self.main, self.slots, self.indices = main, slots, indices
        self.dy = torch.randn((len(indices), main.shape[1]), dtype=dtype, device=main.device)

    def outputs(self) -> tuple[Tensor, None]:
        """Returns what may be written."""
        return self.main, None


def look_up(distribution: str, rows: int, n_tokens: int, device: torch.device) -> Tensor:
    """Returns random indices: uniform, by Zipf's law (p ~ 1 / rank), or 9 of 10 the same."""
    if distribution == "uniform":
        return torch.randint(rows, (n_tokens,), device=device)
    if distribution == "zipf":
        weights = 1 / torch.arange(1, rows + 1, dtype=torch.float64, device=device)
        return torch.multinomial(weights, n_tokens, replacement=True)
    indices = torch.randint(rows, (n_tokens,), device=device)
    is_other = torch.rand(n_tokens, device=device) < 0.1
    return torch.where(is_other, indices, rows // 2)


DISTRIBUTIONS = {"uniform": "uniform", "zipf": "Zipf", "one": "one token 90%"}


def embedding_bytes(sets: Sequence[Embedding], kind: str) -> float:
    """Returns the fewest bytes that a call moves, a mean over the sets."""
    first = sets[0]
    width = first.main.shape[1]
    distinct = sum(int(b.indices.unique().numel()) for b in sets) / len(sets)
    written = 8 * distinct * width if kind == "add" else 4 * first.main.numel()
    return written + first.dy.nbytes + first.indices.nbytes


def embed(b: Embedding, *, backend: str, store: bool, partials: bool) -> None:
    """Calls ours."""
    slots = b.slots if partials else None
    ops.embedding_accumulate_(b.main, b.dy, b.indices, store=store, partials=slots, backend=backend)


def dense(b: Embedding) -> None:
    """Makes the gradient of the whole table, as autograd does, then adds it."""
    rows = b.main.shape[0]
    b.main.add_(torch.ops.aten.embedding_dense_backward(b.dy, b.indices, rows, -1, False))


def index_add(b: Embedding) -> None:
    """Adds rows by index_add_, with float atomics: other bits on each run."""
    b.main.index_add_(0, b.indices, b.dy.float())


def embedding_ways(backends: Sequence[str]) -> list[Way]:
    """Returns the ways."""
    ways = []
    for backend in backends:
        for kind, partials in (("add", False), ("add", True), ("store", False), ("store", True)):
            run = partial(embed, backend=backend, store=kind == "store", partials=partials)
            most = 4 if kind == "store" else Way.most_sets
            ways.append(Way("embedding_accumulate_", backend, kind, run, partials, most_sets=most))
    dense_name = "dense backward + main.add_"
    return [
        *ways,
        Way(dense_name, "torch", "add", dense, is_rounded=True, most_sets=4),
        Way("index_add_", "torch", "add", index_add),
    ]


def embedding_exact(b: Embedding) -> tuple[Tensor, Tensor]:
    """Returns the sums and the sums of absolute values in float64, the second in float32."""
    exact = torch.zeros_like(b.main, dtype=torch.float64).index_add_(0, b.indices, b.dy.double())
    magnitude = torch.zeros_like(b.main).index_add_(0, b.indices, b.dy.abs().float())
    return exact, magnitude * (1 + 1e-3)


# Correctness


def check(way: Way, b: Linear | Embedding, exact: tuple[Tensor, Tensor]) -> None:
    """Runs a way once and compares each element with float64.

    T products, one sum and one factor in float32, whose additions a tensor core may truncate:
    |error| <= (T + 2) * 2^-23 * sum|terms|. A 16-bit result is a rounding of that, or a sum of
    several such. Where T is large that bound is wide; the mean error has one that is not.

    Raises:
        RuntimeError: an element, the mean or the statistics are wrong.
    """
    main, half = b.outputs()
    main.normal_()
    before = main.clone() if way.kind == "add" else None
    if way.kind != "add":
        main.fill_(3e30)  # must not be read
    if way.partials and way.kind == "add" and isinstance(b, Embedding):
        fill_slots(b)
    way.run(b)
    result = half if way.kind == "16-bit" else main
    unit = 2.0**-6 if way.is_rounded else (len(b.dy) + 2) * 2.0**-23
    rows = max(1, PIECE // main.shape[1])
    distance = norm = squares = 0.0
    for begin in range(0, len(main), rows):
        piece = slice(begin, begin + rows)
        truth, magnitude = exact[0][piece], exact[1][piece].double()
        if before is not None:
            start = before[piece].double()
            truth, magnitude = truth + start, magnitude + start.abs()
        got = result[piece].double()
        error = (got - truth).abs_()
        if not bool((error <= unit * magnitude + 1e-30).all()):
            raise RuntimeError(f"wrong beyond rounding in the rows from {begin} on")
        distance += float(error.square().sum())
        norm += float(truth.square().sum())
        squares += float(got.square().sum())
    if not way.is_rounded and not distance <= RELATIVE_L2**2 * norm:
        raise RuntimeError(f"relative L2 error {(distance / norm) ** 0.5:.3g}")
    if way.partials and not abs(float(b.slots.double().sum()) / squares - 1) <= 1e-4:
        raise RuntimeError(f"expected slots with a sum of {squares}, got {b.slots.double().sum()}")


def fill_slots(b: Embedding) -> None:
    """Makes the slots those of main, as they are before something is added."""
    chunks = b.main.flatten().split(ops.CHUNK_SIZE * (1 << 14))
    counts = [ops.num_chunks(chunk.numel()) for chunk in chunks]
    for chunk, slots in zip(chunks, b.slots.split(counts), strict=True):
        padded = torch.zeros(len(slots) * ops.CHUNK_SIZE, device=chunk.device)
        padded[: chunk.numel()] = chunk
        slots.copy_(padded.view(-1, ops.CHUNK_SIZE).square().sum(1))


# Time


def time_calls(calls: Sequence[Callable[[], object]], is_quick: bool) -> Timing:
    """Returns the time of one call, in a graph where there is a GPU."""
    if not torch.cuda.is_available():
        return wall_timing(sample_wall(calls[0], seconds=0, min_repetitions=3))
    once = min(wall for wall, _ in sample_wall(calls[0], seconds=0, min_repetitions=3))
    count = max(len(calls), min(256, int(GRAPH_US / once)), 2)
    repeated = list(itertools.islice(itertools.cycle(calls), count))

    def all_calls():
        for call in repeated:
            call()

    graph = capture(all_calls)
    try:
        seconds = 0.05 if is_quick else 0.1
        return time_replays(graph, calls=count, seconds=seconds, min_repetitions=5)
    finally:
        graph.reset()


def run_case(
    labels: dict,
    ways: Sequence[Way],
    sets: Sequence[Linear | Embedding],
    exact: tuple[Tensor, Tensor],
    work: Callable[[str], tuple[float, float]],
    is_quick: bool,
    failures: list[str],
) -> list[dict]:
    """Returns the rows of one shape, length and dtype.

    Args:
        labels: what the case is.
        ways: what is timed.
        sets: buffers that take turns.
        exact: the gradient of the first set.
        work: the floating-point operations and bytes of a kind of way.
        is_quick: fewer repetitions.
        failures: gets those of the ways.
    """
    rows = []
    for way in ways:
        what = " ".join(map(str, [*labels.values(), way.name, way.backend, way.kind]))
        with report.survived(what + (" with partials" if way.partials else ""), failures):
            check(way, sets[0], exact)
            timing = time_calls([partial(way.run, b) for b in sets[: way.most_sets]], is_quick)
            flops, nbytes = work(way.kind)
            entry = {**labels, "name": way.name, "backend": way.backend, "kind": way.kind}
            entry |= {"partials": way.partials, "flops": flops}
            rows.append({**entry, **report.row(timing, bytes=int(nbytes))})
    release()
    return rows


def run_linear(
    shape: tuple[int, int],
    n_tokens: int,
    dtype: torch.dtype,
    ways: Sequence[Way],
    options: argparse.Namespace,
    failures: list[str],
) -> list[dict]:
    """Returns the rows of one GEMM."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    count = rotation(linear_bytes(shape, n_tokens, "store")) if device.type == "cuda" else 1
    sets = [Linear(shape, n_tokens, dtype, device) for _ in range(min(count, Way.most_sets))]
    flops = 2.0 * shape[0] * shape[1] * n_tokens
    labels = {"case": f"{shape[0]}x{shape[1]}", "tokens": n_tokens, "dtype": DTYPES[dtype]}
    return run_case(
        labels,
        ways,
        sets,
        linear_exact(sets[0]),
        lambda kind: (flops, linear_bytes(shape, n_tokens, kind)),
        options.quick,
        failures,
    )


def run_embedding(
    distribution: str,
    n_tokens: int,
    ways: Sequence[Way],
    options: argparse.Namespace,
    failures: list[str],
) -> list[dict]:
    """Returns the rows of one look-up."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    shape = TABLE[device.type]
    main = torch.randn(shape, device=device)
    slots = torch.zeros(ops.num_chunks(main.numel()), device=device)
    count = rotation(4 * n_tokens * shape[1]) if device.type == "cuda" else 1
    sets = [
        Embedding(main, slots, look_up(distribution, shape[0], n_tokens, device), torch.bfloat16)
        for _ in range(min(count, Way.most_sets))
    ]
    labels = {"case": f"embedding {shape[0]}x{shape[1]}, {DISTRIBUTIONS[distribution]}"}
    labels |= {"tokens": n_tokens, "dtype": "bf16"}
    nbytes = {kind: embedding_bytes(sets, kind) for kind in ("add", "store")}
    return run_case(
        labels,
        ways,
        sets,
        embedding_exact(sets[0]),
        lambda kind: (0.0, nbytes[kind]),
        options.quick,
        failures,
    )


# Floors


def calibrate(device: torch.device) -> dict:
    """Returns the rates of a large bf16 matmul and of a large copy."""
    size, numel = CALIBRATION[device.type]
    a, b = (torch.randn((size, size), dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    matmul = time_calls([partial(torch.mm, a.t(), b, out=out)], is_quick=False)
    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    # Not in a graph, which leaves copies to an engine that is slower than a kernel.
    copy = (time_cuda if device.type == "cuda" else time_cpu)([partial(target.copy_, source)])
    del a, b, out, source, target
    release()
    return {
        "matmul_tflops": round(2 * size**3 / matmul.p50 / 1e6, 4),
        "copy_gb_per_s": round(8 * numel / copy.p50 / 1e3, 2),
    }


def add_floors(rows: Sequence[dict], calibration: dict) -> dict:
    """Writes floor_us and over_floor into each row; returns the rates that they come from."""
    # A shape of the run may be faster than the calibration's.
    fastest = max((r["flops"] / r["p50_us"] / 1e6 for r in rows if r["flops"]), default=0.0)
    rates = {**calibration, "matmul_tflops": max(calibration["matmul_tflops"], round(fastest, 4))}
    for result in rows:
        arithmetic = result["flops"] / rates["matmul_tflops"] / 1e6
        memory = result["bytes"] / rates["copy_gb_per_s"] / 1e3
        result["floor_us"] = round(max(arithmetic, memory), 3)
        result["over_floor"] = round(result["p50_us"] / result["floor_us"], 3)
    return rates


# The run


def cases_of(rows: Sequence[dict]) -> list[list[dict]]:
    """Returns the rows of each case, length and dtype."""
    cases: dict[tuple, list[dict]] = {}
    for result in rows:
        cases.setdefault((result["case"], result["tokens"], result["dtype"]), []).append(result)
    return list(cases.values())


def summary(rows: Sequence[dict]) -> str:
    """Returns the tables that a run ends with: a line a case."""
    parts = []
    for is_wanted, peers in ((False, GEMM_PEERS), (True, EMBEDDING_PEERS)):
        cases = cases_of([r for r in rows if is_embedding(r) == is_wanted])
        lines = [summary_line(case, peers) for case in cases]
        if lines:
            columns = {title: (lambda line, t=title: line[t]) for title in lines[0]}
            parts.append(report.table(lines, columns, n_text=1))
    return "\n\n".join(parts)


GEMM_PEERS = {
    "addmm": ("addmm, beta=1", "add"),
    "mm fp32": ("mm, fp32 out", "store"),
    "mm 16": ("mm, 16-bit out", "16-bit"),
}
EMBEDDING_PEERS = {
    "dense + add_": ("dense backward + main.add_", "add"),
    "index_add_": ("index_add_", "add"),
}


def summary_line(case: Sequence[dict], peers: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Returns one case by column: microseconds, and time over its floor and over ours."""
    first = case[0]
    by_way = {(r["name"], r["backend"], r["kind"], r["partials"]): r for r in case}
    own, backend = next(
        ((r["name"], r["backend"]) for r in case if r["name"].endswith("_accumulate_")), ("", "")
    )

    def time(key: tuple) -> str:
        return f"{by_way[key]['p50_us']:.1f}" if key in by_way else ""

    def ratio(one: tuple, other: tuple) -> str:
        is_there = one in by_way and other in by_way
        return f"{by_way[one]['p50_us'] / by_way[other]['p50_us']:.2f}" if is_there else ""

    add, store = ((own, backend, kind, False) for kind in ("add", "store"))
    line = {"case": f"{first['case']}, {first['dtype']}", "T": str(first["tokens"])}
    line["add us"] = time(add)
    line["/ floor"] = f"{by_way[add]['over_floor']:.2f}" if add in by_way else ""
    line["+ slots"] = time((own, backend, "add", True))
    line["triton"] = time((own, "triton", "add", False))
    line["store"] = time(store)
    line["+ slots "] = time((own, backend, "store", True))
    for title, (name, kind) in peers.items():
        key = name, "torch", kind, False
        line[title] = time(key)
        line["/ add" if kind == "add" else "store / it"] = (
            ratio(key, add) if kind == "add" else ratio(store, key)
        )
    return line


def is_embedding(result: dict) -> bool:
    """Tells a row of an embedding from one of a GEMM."""
    return result["case"].startswith("embedding")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""

    def shapes(text: str) -> list[tuple[int, int]]:
        return [(int(n_out), int(n_in)) for n_out, n_in in (s.split("x") for s in text.split(","))]

    def lengths(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--quick", action="store_true", help="fewer lengths and repetitions")
    parser.add_argument(
        "--shapes",
        type=shapes,
        metavar="4096x4096,512x2048",
        help="of main gradients",
    )
    parser.add_argument(
        "--tokens",
        type=lengths,
        metavar="256,1024",
        help="lengths",
    )
    parser.add_argument(
        "--only", choices=["linear", "embedding"], help="one of the two parts alone"
    )
    parser.add_argument("--backends", type=lambda text: text.split(","), metavar="cuda,triton")
    parser.add_argument("--json", type=Path, help="results file to write", metavar="PATH")
    options = parser.parse_args()
    if options.backends and not set(options.backends) <= set(dispatch.BACKENDS):
        parser.error(f"--backends must be of {', '.join(dispatch.BACKENDS)}")
    options.device = report.device(parser, options.device)
    return options


def our_backends(options: argparse.Namespace) -> list[str]:
    """Returns the backends to time, the default one first; says which are missing."""
    names = options.backends or BACKENDS[options.device]
    for name in names:
        reason = dispatch.why_missing(name)
        if reason is not None:
            report.say(f"without backend {name}: {reason}")
    return [name for name in names if dispatch.why_missing(name) is None] or ["reference"]


def main() -> None:
    """Runs all cases; prints a table, and writes the results file after each."""
    options = parse_arguments()
    device = torch.device(options.device)
    backends = our_backends(options)
    measured_with = environment(device)
    calibration = calibrate(device)
    report.say(str(calibration))
    rows: list[dict] = []
    failures: list[str] = []

    def add(more: list[dict]) -> None:
        rows.extend(more)
        rates = add_floors(rows, calibration)
        if options.json:
            report.save(options.json, measured_with, rows, rates=rates)

    is_short = options.quick and device.type == "cuda"
    if options.only != "embedding":
        ways = linear_ways(backends)
        lengths = options.tokens or (QUICK_TOKENS if is_short else TOKENS[device.type])
        cases = [(s, lengths, torch.bfloat16) for s in options.shapes or SHAPES[device.type]]
        if options.shapes is None:
            cases += [(s, ts, torch.float16) for s, ts in FP16[device.type]]
        for shape, lengths, dtype in cases:
            for n_tokens in lengths:
                report.say(f"{shape[0]}x{shape[1]} T={n_tokens} {DTYPES[dtype]}")
                add(run_linear(shape, n_tokens, dtype, ways, options, failures))
    if options.only != "linear":
        ways = embedding_ways(backends)
        lengths = options.tokens or (QUICK_LOOKUPS if is_short else LOOKUPS[device.type])
        for distribution in DISTRIBUTIONS:
            for n_tokens in lengths:
                report.say(f"embedding {distribution} T={n_tokens}")
                add(run_embedding(distribution, n_tokens, ways, options, failures))
    print(summary(rows))
    report.end(failures)


if __name__ == "__main__":
    main()
