"""The kernels and their peers: main += scale * grad, from 16-bit gradients into fp32.

    python benchmarks/bench_accumulate.py --json benchmarks/results/accumulate_h200.json

One tensor of each size, and lists of tensors. Every way is checked against float64 arithmetic
before it is timed. Memory is cold: the buffers of a case take turns (see timing.py). GB/s come from
the bytes that a way has to move, and are set against a copy measured in the same run.

On the CPU a copy also reads the lines that it overwrites, which no declared byte counts, so shares
above 1 are possible. torch's adds of mixed dtypes make a float32 temporary there: a large one is
fresh pages from malloc on every call, whose faults take most of the time; a small one is not.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import report
import torch
from environment import environment
from timing import Timing, release, rotation, time_cpu, time_cuda, time_cuda_graph
from torch import Tensor

from gradacc_kernels import dispatch, ops

SCALE, INV_SCALE = 0.75, 2.0**-10  # their product is exact in float32
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LOG2_SIZES = {"cuda": [20, 24, 28], "cpu": [20, 24]}
BACKENDS = {"cuda": ["cuda", "triton"], "cpu": ["cpu"]}
LISTS = {"cuda": ["llama-1b", "400x2048"], "cpu": ["400x2048"]}
COPY = "copy_ of fp32"
PIECE = {"cuda": 1 << 24, "cpu": 1 << 18}  # elements checked at a time
BIG = 1 << 28  # bytes of a call that needs no second one between two events
SMALL = 1 << 24  # elements of a list below which launches outweigh memory: timed in a graph too


def llama_1b() -> list[tuple[int, ...]]:
    """Parameter shapes of Llama-3.2-1B, its embedding tied: 146 tensors, 1236M elements."""
    attention = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048)]
    mlp = [(8192, 2048), (8192, 2048), (2048, 8192)]
    return [(128256, 2048)] + 16 * (attention + mlp + [(2048,), (2048,)]) + [(2048,)]


SHAPES = {"llama-1b": llama_1b(), "400x2048": 400 * [(2048,)]}


def views(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Cuts a flat tensor into tensors of these shapes."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class Buffers:
    """One set of random tensors of a case: flat ones, which are checked, and lists of their views.

    Attributes:
        main: float32; what is accumulated into.
        grad: of the case's dtype.
        sum16: of that dtype; what stock 16-bit accumulation adds into.
        other: float32; a gradient, or what is copied.
        slots: statistics slots, a tensor for each of mains.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device):
        numel = sum(math.prod(shape) for shape in shapes)
        self.main = torch.randn(numel, device=device)
        self.other = torch.randn(numel, device=device)
        self.grad = torch.randn(numel, dtype=dtype, device=device)
        self.sum16 = torch.randn(numel, dtype=dtype, device=device)
        self.mains, self.grads, self.sums16 = (
            views(flat, shapes) for flat in (self.main, self.grad, self.sum16)
        )
        counts = [ops.num_chunks(main.numel()) for main in self.mains]
        self.slots = list(torch.zeros(sum(counts), device=device).split(counts))
        self.inv_scale = torch.full((), INV_SCALE, device=device)
        self.found_inf = torch.zeros((), device=device)


@dataclass(frozen=True)
class Way:
    """One way to do the work, with what it is to give.

    Attributes:
        name: for the tables.
        backend: one of ours, or "torch".
        bytes: declared bytes per element.
        run: does it to a set of buffers; returns (norm, found_inf) where norm_bound is set.
        terms: what is summed: the flat tensors of Buffers and the factor of each, before the run.
        target: the flat tensor that holds the sum after it.
        norm_bound: allowed relative error of the norm; None where none is computed.
        is_loop: takes the tensors one by one.
        is_headline: what all others are compared with.
    """

    name: str
    backend: str
    bytes: int
    run: Callable[[Buffers], object]
    terms: Mapping[str, float]
    target: str = "main"
    norm_bound: float | None = None
    is_loop: bool = False
    is_headline: bool = False


def our_ways(backend: str, is_list: bool) -> list[Way]:
    """Returns our ways: scaled, and with statistics slots written in the same pass."""
    op = "multi_accumulate_" if is_list else "accumulate_"

    def accumulate(b: Buffers, store: bool = False):
        if is_list:
            ops.multi_accumulate_(
                b.mains,
                b.grads,
                scale=SCALE,
                inv_scale=b.inv_scale,
                stores=len(b.mains) * [True] if store else None,
                partials=b.slots,
                backend=backend,
            )
        else:
            ops.accumulate_(
                b.main,
                b.grad,
                scale=SCALE,
                inv_scale=b.inv_scale,
                store=store,
                partials=b.slots[0],
                backend=backend,
            )

    def statistics(b: Buffers):
        return ops.grad_stats(partials=b.slots, backend=backend)[1:]

    def accumulate_and_statistics(b: Buffers):
        accumulate(b)
        return statistics(b)

    # A chunk adds up CHUNK_SIZE squares in float32; a root halves the relative error.
    bound = (ops.CHUNK_SIZE + 3) * 2.0**-25
    store = partial(accumulate, store=True)
    added, stored = {"main": 1.0, "grad": SCALE * INV_SCALE}, {"grad": SCALE * INV_SCALE}
    return [
        Way(f"{op} (store)", backend, 6, store, stored),
        Way(f"{op} (add)", backend, 10, accumulate, added),
        Way(
            f"{op} + grad_stats",
            backend,
            10,
            accumulate_and_statistics,
            added,
            norm_bound=bound,
            is_headline=True,
        ),
    ]


def add_each(b: Buffers) -> None:
    """Adds with torch's mixed-dtype add_."""
    for main, grad in zip(b.mains, b.grads, strict=True):
        main.add_(grad)


def add_each_in_16_bits(b: Buffers) -> None:
    """Does what autograd does by default: sums in the gradient's own dtype."""
    for total, grad in zip(b.sums16, b.grads, strict=True):
        total.add_(grad)


def add_unscale_norm(b: Buffers) -> tuple[Tensor, Tensor]:
    """Adds, then closes a window as GradScaler.unscale_ and a norm do, in passes of their own."""
    add_each(b)
    torch._amp_foreach_non_finite_check_and_unscale_(b.mains, b.found_inf, b.inv_scale)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(b.mains))), b.found_inf


def peer_ways() -> list[Way]:
    """Returns torch's ways for 16-bit gradients."""
    added = {"main": 1.0, "grad": 1.0}
    return [
        Way("main.add_(grad)", "torch", 10, add_each, added, is_loop=True),
        Way(
            "_foreach_add_",
            "torch",
            10,
            lambda b: torch._foreach_add_(b.mains, b.grads),
            added,
            is_loop=True,
        ),
        Way(
            "main.add_(grad) + unscale, check + norm",
            "torch",
            22,
            add_unscale_norm,
            {"main": INV_SCALE, "grad": INV_SCALE},
            norm_bound=1e-2,  # torch's norm promises none; on a CPU 1e-3 was seen
            is_loop=True,
        ),
        Way(
            "16-bit sum.add_(grad)",
            "torch",
            6,
            add_each_in_16_bits,
            {"sum16": 1.0, "grad": 1.0},
            target="sum16",
            is_loop=True,
        ),
    ]


def single_tensor_ways() -> list[Way]:
    """Returns more of torch's ways, which a list of tensors need not repeat."""
    return [
        Way(
            "grad_dtype=float32: main.add_(grad.float())",
            "torch",
            18,
            lambda b: b.main.add_(b.grad.float()),
            {"main": 1.0, "grad": 1.0},
        ),
        Way(
            "_foreach_add_ (alpha)",
            "torch",
            10,
            lambda b: torch._foreach_add_(b.mains, b.grads, alpha=SCALE),
            {"main": 1.0, "grad": SCALE},
        ),
    ]


def fp32_ways() -> list[Way]:
    """Returns the ways without a 16-bit gradient: the copy gives the bandwidth to compare with."""
    added, copied = {"main": 1.0, "other": 1.0}, {"other": 1.0}
    return [
        Way("main.add_(fp32 grad)", "torch", 12, lambda b: b.main.add_(b.other), added),
        Way(COPY, "torch", 8, lambda b: b.main.copy_(b.other), copied),
    ]


def check(way: Way, buffers: Buffers) -> None:
    """Runs a way once and compares each element with float64 arithmetic.

    Two roundings of a sum of two terms: |error| <= 3u * sum|terms|, and half a subnormal each.

    Raises:
        RuntimeError: an element, the norm or the overflow verdict is wrong.
    """
    before = {name: getattr(buffers, name) for name in way.terms}
    if way.target in before:
        before[way.target] = before[way.target].clone()
    outcome = way.run(buffers)
    result = getattr(buffers, way.target)
    unit = torch.finfo(result.dtype).eps / 2
    tiny = torch.finfo(result.dtype).smallest_normal * unit
    squares = 0.0
    step = PIECE[result.device.type]
    for begin in range(0, result.numel(), step):
        piece = slice(begin, begin + step)
        terms = [before[name][piece].double() * factor for name, factor in way.terms.items()]
        got = result[piece].double()
        error = (got - sum(terms)).abs_()
        bound = 3 * unit * sum(term.abs_() for term in terms) + 2 * tiny
        if not bool((error <= bound).all()):
            raise RuntimeError(f"{way.name}, {way.backend}: wrong beyond rounding from {begin} on")
        squares += float(got.square().sum())
    if way.norm_bound is None:
        return
    norm, found_inf = (float(value) for value in outcome)
    if found_inf != 0 or not abs(norm / math.sqrt(squares) - 1) <= way.norm_bound:
        raise RuntimeError(
            f"{way.name}, {way.backend}: expected norm {math.sqrt(squares)} and no overflow, got "
            f"{norm} and found_inf {found_inf}"
        )


def measure(way: Way, sets: Sequence[Buffers]) -> list[Timing]:
    """Checks a way, then returns its timings: one, and one in a CUDA graph for a small list."""
    check(way, sets[0])
    calls = [partial(way.run, buffers) for buffers in sets]
    main, n_tensors = sets[0].main, len(sets[0].mains)
    if main.device.type == "cpu":
        return [time_cpu(calls)]
    is_long = way.bytes * main.numel() >= BIG or (way.is_loop and n_tensors > 1)
    timings = [time_cuda(calls, calls_per_event=1 if is_long else 16)]
    # Triton's list ops launch tensor by tensor under capture: another thing than what is asked.
    if n_tensors > 1 and main.numel() < SMALL and way.backend != "triton":
        timings.append(time_cuda_graph(calls))
    return timings


def run_case(
    case: str,
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    backends: Sequence[str],
    device: torch.device,
) -> list[dict]:
    """Returns the rows of one size or list, and one dtype."""
    ways = [way for backend in backends for way in our_ways(backend, len(shapes) > 1)]
    ways += peer_ways()
    if len(shapes) == 1:
        ways += single_tensor_ways()
        if dtype == torch.bfloat16:  # once for all dtypes
            ways += fp32_ways()
    numel = sum(math.prod(shape) for shape in shapes)
    torch.manual_seed(0)
    sets = [Buffers(shapes, dtype, device) for _ in range(rotation(6 * numel))]
    rows = []
    for way in report.tracked(ways, f"{case} {DTYPES[dtype]}"):
        for timing in measure(way, sets):
            rows.append(
                report.row(
                    timing,
                    case=case,
                    name=way.name,
                    backend=way.backend,
                    dtype=DTYPES[dtype if "grad" in way.terms else torch.float32],
                    n=numel,
                    tensors=len(shapes),
                    headline=way.is_headline,
                    bytes=way.bytes * numel,
                )
            )
    return rows


def log2_sizes(text: str) -> list[int]:
    """Parses --sizes."""
    return [int(size) for size in text.split(",")]


def list_names(text: str) -> list[str]:
    """Parses --lists."""
    names = [name for name in text.split(",") if name]
    if not set(names) <= set(SHAPES):
        raise argparse.ArgumentTypeError(f"expected names of {', '.join(SHAPES)}, got {text}")
    return names


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument(
        "--sizes", type=log2_sizes, help="log2 of the sizes of one tensor", metavar="20,24,28"
    )
    parser.add_argument(
        "--lists", type=list_names, help="lists of tensors, or nothing", metavar=",".join(SHAPES)
    )
    parser.add_argument("--json", type=Path, help="results file to write", metavar="PATH")
    options = parser.parse_args()
    options.device = report.device(parser, options.device)
    if options.sizes is None:
        options.sizes = LOG2_SIZES[options.device]
    if options.lists is None:
        options.lists = LISTS[options.device]
    return options


def fast_backends(device: torch.device) -> list[str]:
    """Returns our backends for a device, the slow reference left out; says which are missing."""
    missing = {name: dispatch.why_missing(name) for name in BACKENDS[device.type]}
    for name, reason in missing.items():
        if reason is not None:
            print(f"without backend {name}: {reason}", file=sys.stderr)
    backends = [name for name, reason in missing.items() if reason is None]
    if not backends:
        sys.exit("bench_accumulate: no fast backend serves this device")
    return backends


def main() -> None:
    """Runs all cases; prints the table, and writes the results file."""
    options = parse_arguments()
    device = torch.device(options.device)
    backends = fast_backends(device)
    measured_with = environment(device)
    rows = []
    for size in options.sizes:
        for dtype in (torch.bfloat16, torch.float16):
            rows += run_case(f"2^{size}", [(2**size,)], dtype, backends, device)
            release()
    for name in options.lists:
        rows += run_case(name, SHAPES[name], torch.bfloat16, backends, device)
        release()
    # The largest copy, since small ones are bound by their launch.
    copy = max((r for r in rows if r["name"] == COPY), key=lambda r: r["n"])
    report.add_share_of_copy(rows, copy["gb_per_s"])
    if options.json:
        report.save(options.json, measured_with, rows)
    print(report.table(rows))


if __name__ == "__main__":
    main()
