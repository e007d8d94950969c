"""Ways to add 16-bit gradients into fp32, checked against float64 and timed, on one tensor or many.

Two states of the caches. "cold": nothing of a call's memory is in them. Sets of buffers take turns
(see timing.py); where that would need too many sets, memory of COLD_BYTES is overwritten before
them. "warm": as backward leaves it, the gradient was written by the kernel right before the call,
and the rest is cold: a CUDA graph of (write, call) for all sets, less the time of a graph of the
writes alone. The write is grad.neg_(), which reads and writes the gradient and nothing else. Of a
gradient larger than the cache the end alone is warm.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import report
import torch
from shapes import Shape
from shapes import numel as numel_of
from timing import (
    COLD_BYTES,
    Timing,
    release,
    rotation,
    sample_wall,
    time_cpu,
    time_cuda,
    time_difference,
    wall_timing,
)
from torch import Tensor

from gradacc_kernels import dispatch, ops

SCALE, INV_SCALE = 0.75, 2.0**-10  # their product is exact in float32
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
BACKENDS = {"cuda": ["cuda", "triton"], "cpu": ["cpu"]}
PIECE = {"cuda": 1 << 24, "cpu": 1 << 18}  # elements filled or checked at a time
COPY = {"cuda": 1 << 28, "cpu": 1 << 24}  # elements of the copy that all is compared with
BIG = 1 << 28  # bytes of a call that needs no second one between two events
SMALL = 1 << 25  # elements of a list below which launches outweigh memory: timed in a graph too
LAUNCHES = 800  # of a call that fits into the queue of a GPU, about 1000
MAX_SETS, MAX_TENSORS = 64, 8192  # sets of buffers, and tensors in all of them
LONGEST = 20e-3  # seconds of the host between two events, where a call does not take longer
SECONDS = 0.4  # after which 3 samples are enough


def views(flat: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Cuts a flat tensor into tensors of these shapes."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class Buffers:
    """One set of random tensors of a case: flat ones, which are checked, and lists of their views.

    They are allocated when they are first read. Their values are those of a seed for each piece,
    so that a check needs no copy of what it overwrote.

    Attributes:
        main: float32; what is accumulated into.
        grad: of the case's dtype.
        sum16: of that dtype; what stock 16-bit accumulation adds into.
        other: float32; a gradient, a second summand, or what is copied.
        slots: statistics slots, a tensor for each of mains.
    """

    FLAT: Mapping[str, str | None] = {
        "main": "mains",
        "grad": "grads",
        "sum16": "sums16",
        "other": None,
    }

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device):
        self.shapes, self.dtype, self.device = shapes, dtype, device
        self.numel = numel_of(shapes)

    main = cached_property(lambda self: self._filled("main"))
    grad = cached_property(lambda self: self._filled("grad"))
    sum16 = cached_property(lambda self: self._filled("sum16"))
    other = cached_property(lambda self: self._filled("other"))
    mains = cached_property(lambda self: views(self.main, self.shapes))
    grads = cached_property(lambda self: views(self.grad, self.shapes))
    sums16 = cached_property(lambda self: views(self.sum16, self.shapes))
    inv_scale = cached_property(lambda self: torch.full((), INV_SCALE, device=self.device))
    found_inf = cached_property(lambda self: torch.zeros((), device=self.device))

    @cached_property
    def slots(self) -> list[Tensor]:
        """Statistics slots, a tensor for each of mains."""
        counts = [ops.num_chunks(math.prod(shape)) for shape in self.shapes]
        return list(torch.zeros(sum(counts), device=self.device).split(counts))

    def pieces(self) -> Iterator[slice]:
        """Yields what is filled or checked at a time."""
        step = PIECE[self.device.type]
        for begin in range(0, self.numel, step):
            yield slice(begin, min(begin + step, self.numel))

    def values(self, name: str, piece: slice) -> Tensor:
        """Returns what a piece of a flat tensor is filled with."""
        is_16_bit = name in ("grad", "sum16")
        generator = torch.Generator(self.device)
        generator.manual_seed(list(self.FLAT).index(name) << 48 | piece.start)
        return torch.randn(
            piece.stop - piece.start,
            generator=generator,
            dtype=self.dtype if is_16_bit else torch.float32,
            device=self.device,
        )

    def _filled(self, name: str) -> Tensor:
        dtype = self.dtype if name in ("grad", "sum16") else torch.float32
        flat = torch.empty(self.numel, dtype=dtype, device=self.device)
        self._fill(flat, name)
        return flat

    def _fill(self, flat: Tensor, name: str) -> None:
        for piece in self.pieces():
            flat[piece] = self.values(name, piece)

    def refill(self, name: str) -> None:
        """Gives a flat tensor the values that it began with."""
        self._fill(getattr(self, name), name)

    def keep(self, names: set[str]) -> None:
        """Frees all flat tensors but these."""
        for flat, cut in self.FLAT.items():
            if flat not in names:
                self.__dict__.pop(flat, None)
                self.__dict__.pop(cut, None)


@dataclass(frozen=True)
class Way:
    """One way to do the work, with what it is to give.

    Attributes:
        name: for the tables.
        backend: one of ours, or "torch".
        bytes: declared bytes per element.
        flops: operations per element: products, sums, squares.
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
    flops: int
    run: Callable[[Buffers], object]
    terms: Mapping[str, float]
    target: str = "main"
    norm_bound: float | None = None
    is_loop: bool = False
    is_headline: bool = False

    @property
    def buffers(self) -> set[str]:
        """The flat tensors that it needs."""
        return {*self.terms, self.target}

    @property
    def source(self) -> str:
        """The flat tensor that backward would have written."""
        return "grad" if "grad" in self.terms else "other"


def our_ways(backend: str, is_list: bool) -> list[Way]:
    """Returns our ways: scaled, with statistics slots written in the same pass."""
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

    def with_statistics(b: Buffers, store: bool = False):
        accumulate(b, store)
        return ops.grad_stats(partials=b.slots, backend=backend)[1:]

    # A chunk adds up CHUNK_SIZE squares in float32; a root halves the relative error.
    bound = (ops.CHUNK_SIZE + 3) * 2.0**-25
    store, store_with_statistics = (
        partial(accumulate, store=True),
        partial(with_statistics, store=True),
    )
    added, stored = {"main": 1.0, "grad": SCALE * INV_SCALE}, {"grad": SCALE * INV_SCALE}
    headline = {"norm_bound": bound, "is_headline": True}
    return [
        Way(f"{op} (store)", backend, 6, 3, store, stored),
        Way(
            f"{op} (store) + grad_stats",
            backend,
            6,
            3,
            store_with_statistics,
            stored,
            norm_bound=bound,
        ),
        Way(f"{op} (add)", backend, 10, 4, accumulate, added),
        Way(f"{op} + grad_stats", backend, 10, 4, with_statistics, added, **headline),
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


def add_way() -> Way:
    """Returns torch's add_ of a 16-bit gradient into float32."""
    added = {"main": 1.0, "grad": 1.0}
    return Way("main.add_(grad)", "torch", 10, 1, add_each, added, is_loop=True)


def peer_ways() -> list[Way]:
    """Returns torch's ways for 16-bit gradients; the one that needs other buffers is the last."""
    return [
        add_way(),
        Way(
            "_foreach_add_",
            "torch",
            10,
            1,
            lambda b: torch._foreach_add_(b.mains, b.grads),
            {"main": 1.0, "grad": 1.0},
            is_loop=True,
        ),
        Way(
            "main.add_(grad) + unscale, check + norm",
            "torch",
            22,
            4,
            add_unscale_norm,
            {"main": INV_SCALE, "grad": INV_SCALE},
            norm_bound=1e-2,  # torch's norm promises none; on a CPU 1e-3 was seen
            is_loop=True,
        ),
        Way(
            "16-bit sum.add_(grad)",
            "torch",
            6,
            1,
            add_each_in_16_bits,
            {"sum16": 1.0, "grad": 1.0},
            target="sum16",
            is_loop=True,
        ),
    ]


def _axpby(b: Buffers) -> None:
    torch.mul(b.other, SCALE, out=b.main)
    torch._foreach_add_([b.main], [b.grad], alpha=INV_SCALE)


def single_tensor_ways() -> list[Way]:
    """Returns more of torch's ways, which a list of tensors need not repeat."""
    return [
        Way(
            "grad_dtype=float32: main.add_(grad.float())",
            "torch",
            18,
            1,
            lambda b: b.main.add_(b.grad.float()),
            {"main": 1.0, "grad": 1.0},
        ),
        Way(
            "_foreach_add_ (alpha)",
            "torch",
            10,
            2,
            lambda b: torch._foreach_add_(b.mains, b.grads, alpha=SCALE),
            {"main": 1.0, "grad": SCALE},
        ),
        Way(
            "out = a*grad + b*other (as Apex axpby): mul(out=), _foreach_add_",
            "torch",
            18,
            3,
            _axpby,
            {"grad": INV_SCALE, "other": SCALE},
        ),
    ]


def _add_scaled(main: Tensor, grad: Tensor) -> Tensor:
    return main.add_(grad.float(), alpha=SCALE)


@functools.cache
def why_not_compiled(device_type: str) -> str | None:
    """Returns why inductor cannot compile for a device, or None when it can."""
    try:
        from torch._inductor import config

        config.compile_threads = 1  # one kernel a case: no pool of processes
        main, grad = (torch.ones(64, device=device_type) for _ in range(2))
        torch.compile(_add_scaled, dynamic=False)(main, grad)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def compiled_ways(device: torch.device) -> list[Way]:
    """Returns the compiled add, or says why there is none. Once a case: it forgets the others."""
    reason = why_not_compiled(device.type)
    if reason is not None:
        print(f"without torch.compile: {reason}", file=sys.stderr)
        return []
    torch._dynamo.reset()  # more shapes than dynamo compiles would run eagerly
    add = torch.compile(_add_scaled, dynamic=False, fullgraph=True)
    name = "torch.compile: main.add_(grad.float(), alpha=s)"
    terms = {"main": 1.0, "grad": SCALE}
    return [Way(name, "torch", 10, 2, lambda b: add(b.main, b.grad), terms)]


def copy_way() -> Way:
    """Returns the copy."""
    copied = {"other": 1.0}
    return Way("copy_ of fp32", "torch", 8, 0, lambda b: b.main.copy_(b.other), copied)


def fp32_ways() -> list[Way]:
    """Returns the ways without a 16-bit gradient."""
    added = {"main": 1.0, "other": 1.0}
    add = Way("main.add_(fp32 grad)", "torch", 12, 1, lambda b: b.main.add_(b.other), added)
    return [add, copy_way()]


def check(way: Way, buffers: Buffers) -> None:
    """Runs a way once and compares each element with float64 arithmetic.

    Two roundings of a sum of two terms: |error| <= 3u * sum|terms|, and half a subnormal each.

    Raises:
        RuntimeError: an element, the norm or the overflow verdict is wrong.
    """
    for name in way.buffers:
        buffers.refill(name)
    outcome = way.run(buffers)
    result = getattr(buffers, way.target)
    unit = torch.finfo(result.dtype).eps / 2
    tiny = torch.finfo(result.dtype).smallest_normal * unit
    squares = torch.zeros((), dtype=torch.float64, device=result.device)
    for piece in buffers.pieces():
        terms = [
            buffers.values(name, piece).double() * factor for name, factor in way.terms.items()
        ]
        got = result[piece].double()
        error = (got - sum(terms)).abs_()
        bound = 3 * unit * sum(term.abs_() for term in terms) + 2 * tiny
        if not bool((error <= bound).all()):
            begin = piece.start
            raise RuntimeError(f"{way.name}, {way.backend}: wrong beyond rounding from {begin} on")
        squares += got.square_().sum()
    if way.norm_bound is None:
        return
    expected = math.sqrt(float(squares))
    norm, found_inf = (float(value) for value in outcome)
    if found_inf != 0 or not abs(norm / expected - 1) <= way.norm_bound:
        raise RuntimeError(
            f"{way.name}, {way.backend}: expected norm {expected} and no overflow, got {norm} and "
            f"found_inf {found_inf}"
        )


class Case:
    """One size or list and one dtype: sets of buffers, and what clears the caches before them."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device):
        self.shapes, self.device, self.numel = shapes, device, numel_of(shapes)
        cold = rotation(6 * self.numel)
        n_sets = max(1, min(cold, MAX_SETS, MAX_TENSORS // len(shapes)))
        self.sets = [Buffers(shapes, dtype, device) for _ in range(n_sets)]
        self.is_list = len(shapes) > 1
        self._trash = torch.empty(COLD_BYTES // 4, device=device) if n_sets < cold else None

    def evict(self) -> None:
        """Overwrites what the caches hold, where turns do not suffice for that."""
        if self._trash is not None:
            self._trash.fill_(1.0)

    def write(self, way: Way, buffers: Buffers) -> None:
        """Writes the gradient, as backward does."""
        getattr(buffers, way.source).neg_()

    def each(self, way: Way, *, writes: bool, runs: bool) -> None:
        """Clears the caches, then writes the gradient of each set, or runs the way, or both."""
        self.evict()
        for buffers in self.sets:
            if writes:
                self.write(way, buffers)
            if runs:
                way.run(buffers)

    def difference(self, way: Way, *, writes: bool) -> Timing:
        """Returns the time of a call in a graph, less all that the graph does besides."""
        has_more = writes or self._trash is not None
        return time_difference(
            partial(self.each, way, writes=writes, runs=True),
            partial(self.each, way, writes=writes, runs=False) if has_more else None,
            calls=len(self.sets),
        )

    def cold(self, way: Way) -> list[Timing]:
        """Returns timings with cold caches: one, and one in a CUDA graph for a small list."""
        calls = [partial(way.run, buffers) for buffers in self.sets]
        evict = None if self._trash is None else self.evict
        if self.device.type == "cpu":
            return [time_cpu(calls, before=len(calls) * [evict] if evict else ())]
        is_long_loop = way.is_loop and len(self.shapes) > LAUNCHES
        if is_long_loop:
            calls[0]()
            samples = sample_wall(calls[0], seconds=0.2, min_repetitions=5, before=evict)
            timings = [wall_timing(samples)]
        else:
            per_event = self._calls_per_event(way)
            timings = [time_cuda(calls, calls_per_event=per_event, before=evict, seconds=SECONDS)]
        # Triton's list ops launch tensor by tensor under capture: another thing than is asked for.
        if self.is_list and self.numel < SMALL and way.backend != "triton":
            timings.append(self.difference(way, writes=False))
        return timings

    def _calls_per_event(self, way: Way) -> int:
        if way.bytes * self.numel >= BIG or (way.is_loop and self.is_list):
            return 1
        way.run(self.sets[0])
        torch.cuda.synchronize()
        begin = time.perf_counter()
        way.run(self.sets[0])
        host = time.perf_counter() - begin
        at_most = 16 if self._trash is None else min(16, len(self.sets))
        return max(1, min(at_most, int(LONGEST / host)))

    def warm(self, way: Way) -> list[Timing]:
        """Returns the timing of a call whose gradient was written right before it."""
        is_triton_list = self.is_list and way.backend == "triton"
        if is_triton_list and len(self.shapes) > LAUNCHES:
            return []  # its host needs some 20 us a tensor, so that samples take seconds
        if self.device.type == "cuda" and not is_triton_list:
            return [self.difference(way, writes=True)]

        def before(buffers: Buffers):
            self.evict()
            self.write(way, buffers)

        befores = [partial(before, buffers) for buffers in self.sets]
        calls = [partial(way.run, buffers) for buffers in self.sets]
        if self.device.type == "cpu":
            return [time_cpu(calls, before=befores)]
        return [time_cuda(calls[:1], before=befores[0], seconds=SECONDS)]


def rows_of(
    name: str,
    case: Case,
    ways: Sequence[Way],
    caches: Sequence[str],
    dtype: torch.dtype,
    failures: list[str],
) -> list[dict]:
    """Checks and times the ways of a case, each with these states of the caches; returns rows."""
    rows = []
    for way in report.tracked(ways, f"{name} {DTYPES[dtype]}"):
        with report.survived(f"{name} {DTYPES[dtype]}: {way.name}, {way.backend}", failures):
            for buffers in case.sets:
                buffers.keep(way.buffers)
            check(way, case.sets[0])
            for cache in caches:
                for timing in getattr(case, cache)(way):
                    rows.append(
                        report.row(
                            timing,
                            case=name,
                            name=way.name,
                            backend=way.backend,
                            dtype=DTYPES[dtype if "grad" in way.terms else torch.float32],
                            n=case.numel,
                            tensors=len(case.shapes),
                            headline=way.is_headline,
                            cache=cache,
                            flops=way.flops * case.numel,
                            bytes=way.bytes * case.numel,
                        )
                    )
    return rows


def copy_gb_per_s(device: torch.device) -> float:
    """Returns the bandwidth of a large copy of float32, cold."""
    source, target = (torch.ones(COPY[device.type], device=device) for _ in range(2))
    calls = [partial(target.copy_, source)]
    timing = time_cuda(calls, repetitions=50) if device.type == "cuda" else time_cpu(calls)
    return 8 * source.numel() / timing.p50 / 1e3


def why_too_large(numel: int, bytes_per_element: int, device: torch.device) -> str | None:
    """Returns why a case does not fit into the memory that is free, or None when it does."""
    if device.type == "cpu":
        return None
    release()
    needed, free = bytes_per_element * numel + (3 << 30), torch.cuda.mem_get_info(device)[0]
    return None if needed <= free else f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free"


def fast_backends(device: torch.device) -> list[str]:
    """Returns our backends for a device, the slow reference left out; says which are missing."""
    missing = {name: dispatch.why_missing(name) for name in BACKENDS[device.type]}
    for name, reason in missing.items():
        if reason is not None:
            print(f"without backend {name}: {reason}", file=sys.stderr)
    backends = [name for name, reason in missing.items() if reason is None]
    if not backends:
        sys.exit("no fast backend serves this device")
    return backends
