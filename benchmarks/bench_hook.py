"""What a gradient's hook costs: host microseconds a parameter, and how long the GPU idles for it.

    python benchmarks/bench_hook.py --json benchmarks/results/hook_h200.json

Backward of ``flat = torch.cat([p.view(-1) for p in params])`` hands every parameter a view of one
given gradient, which autograd stores where ``.grad`` is None, without a copy: a backward without a
kernel, and the part that all ways share. Ways take turns; each has parameters and a graph of its
own, and adds to sums that exist. The host's time is that of the call of backward, begun on an idle
GPU; "over no hook" is the median over the rounds of what a way took more. Wall time goes on until
the GPU has ended, of which it was busy for as long as the same backward takes in a CUDA graph.

Every way's sum of three gradients is first compared with float64.

On the CPU the host's time contains the arithmetic, and nothing is queued.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gradient_ways
import report
import shapes
import torch
from environment import environment
from timing import capture, capture_stream, quantiles, release, sample_wall, time_replays
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import gradacc_kernels as gk
from gradacc_kernels import hook

MICRO_BATCHES = 3  # whose sum is checked
TURN = 3  # backwards of a way before it is the next one's turn; the first is not counted
MIN_ROUNDS = 3
GRAPH_TENSORS = 2000  # a graph has as many backwards as it takes to have so many gradients
MAX_GRAPH_CALLS = 20
TARGETS_US = {"queued": 0.5, "at once": 3.0}  # a parameter, of the C++ hook over no hook
METHOD = {
    "host": "backward's call, begun on an idle GPU, a parameter",
    "over no hook": "median over rounds of the difference, a parameter",
    "busy": "the same backward in a CUDA graph, or the profiler's sum of kernels",
    "idle": "wall time of backward until the GPU has ended, less busy",
}


# The cases


@dataclass(frozen=True)
class Case:
    """Parameters of these shapes."""

    name: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def elements(self) -> int:
        """The elements of all."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    def arrival(self, device: torch.device) -> str:
        """Returns what the C++ hook does with 16-bit gradients: "queued", "at once" or "both"."""
        below = hook.QUEUE_BELOW[device.type]
        waits = {2 * torch.Size(shape).numel() < below for shape in self.shapes}
        return "both" if len(waits) > 1 else "queued" if waits == {True} else "at once"


def cases(is_cuda: bool) -> list[Case]:
    """Returns the cases; on the CPU, whose memory is the limit, fewer large tensors."""
    n_large = 100 if is_cuda else 10
    return [
        Case("400 x 2048", 400 * ((2048,),)),
        Case(f"{n_large} x 2^20", n_large * ((1 << 20,),)),
        Case("ResNet-50", tuple(shapes.SHAPES["resnet-50"])),
        Case("10000 x 16", 10000 * ((16,),)),
        Case("1 x 2048", ((2048,),)),
    ]


# The ways


class NoHook:
    """Nothing sums: autograd stores its view of the gradient."""

    def __init__(self, params: Sequence[nn.Parameter]):
        self.params = params

    def before(self) -> None:
        """Makes ready for a backward, outside of what is timed."""
        for param in self.params:
            param.grad = None

    def clear(self) -> None:
        """Begins a sum."""
        self.before()

    def grads(self) -> list[Tensor | None]:
        """Returns the sums."""
        return [param.grad for param in self.params]


class Kept(NoHook):
    """PyTorch adds to a ``.grad`` that is there from the start: a first one would be our view."""

    def __init__(self, params: Sequence[nn.Parameter], dtype: torch.dtype, **grad_dtype):
        super().__init__(params)
        for param in params:
            if grad_dtype:
                param.grad_dtype = grad_dtype["grad_dtype"]
            param.grad = torch.zeros_like(param, dtype=dtype)

    def before(self) -> None:
        """Leaves the sums as they are."""

    def clear(self) -> None:
        """Begins a sum."""
        for param in self.params:
            param.grad.zero_()


class PythonHook(Kept):
    """gradient_ways.PythonHook."""

    def __init__(self, params: Sequence[nn.Parameter]):
        self.hook = gradient_ways.PythonHook(nn.ParameterList(params))

    def clear(self) -> None:
        """Begins a sum."""
        self.hook.zero()

    def grads(self) -> list[Tensor | None]:
        """Returns the sums."""
        return self.hook.grads()


class Attached(Kept):
    """gradacc_kernels.attach."""

    def __init__(self, params: Sequence[nn.Parameter], backend: str):
        self.params = params
        self.accumulator = gk.attach(params, backend=backend)

    def clear(self) -> None:
        """Begins a sum."""
        for param in self.params:
            param.grad = None


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        name: for the tables.
        role: "none", "stock", "peer", "ours" (the C++ hook) or "python" (our Python hook).
        set_up: makes parameters use it.
        unit_roundoff: of an addition to its sum; 0 where it sums nothing.
    """

    name: str
    role: str
    set_up: Callable[[Sequence[nn.Parameter]], NoHook]
    unit_roundoff: float = 2.0**-24


def ways(device: torch.device) -> list[Way]:
    """Returns the ways, in the order of the tables."""
    fp32 = torch.float32
    python_backend = "triton" if device.type == "cuda" else "reference"
    return [
        Way("no hook", "none", NoHook, 0.0),
        Way("PyTorch bf16 .grad", "stock", lambda ps: Kept(ps, torch.bfloat16), 2.0**-9),
        Way("grad_dtype=None, float32 .grad", "peer", lambda ps: Kept(ps, fp32, grad_dtype=None)),
        Way("grad_dtype=float32", "peer", lambda ps: Kept(ps, fp32, grad_dtype=fp32)),
        Way("Python hook, main.add_(grad)", "peer", PythonHook),
        Way("attach, C++ hook", "ours", lambda ps: Attached(ps, device.type)),
        Way(
            f'attach(backend="{python_backend}"), Python hook',
            "python",
            lambda ps: Attached(ps, python_backend),
        ),
    ]


class Subject:
    """A way's parameters, and the graph through which they get a gradient."""

    def __init__(self, way: Way, case: Case, grad: Tensor):
        self.way = way
        self.grad = grad
        self.params = [
            nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device=grad.device))
            for shape in case.shapes
        ]
        self.sums = way.set_up(self.params)
        self.flat = torch.cat([param.view(-1) for param in self.params])
        self.samples: list[list[tuple[float, float]]] = []

    def backward(self) -> None:
        """What is timed."""
        self.flat.backward(self.grad, retain_graph=True)

    def turn(self) -> None:
        """Takes the samples of a round."""
        samples = []
        for _ in range(TURN):
            self.sums.before()
            if self.grad.is_cuda:
                torch.cuda.synchronize()
            samples += sample_wall(self.backward, seconds=0, min_repetitions=1)
        self.samples.append(samples[1:])


# Correctness

VIEWS = {"reshape", "as_strided", "narrow", "view", "slice", "detach", "alias", "_reshape_alias"}


def check_stored(subject: Subject) -> None:
    """Raises RuntimeError unless a backward without a hook stores views and computes nothing."""
    subject.sums.clear()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        subject.backward()
    names = {e.name for e in profiled.events() if e.name.startswith("aten::")}
    if not names <= {f"aten::{view}" for view in VIEWS}:
        raise RuntimeError(f"no hook: expected views alone, got {sorted(names)}")
    storage = subject.grad.untyped_storage().data_ptr()
    if any(grad.untyped_storage().data_ptr() != storage for grad in subject.sums.grads()):
        raise RuntimeError("no hook: expected views of the gradient, got copies of it")


def check_sum(subject: Subject) -> float:
    """Compares a sum of micro-batches with float64.

    Returns:
        The largest error, as a share of the bound (k + 1) u sum|terms| of k additions.

    Raises:
        RuntimeError: it is over the bound.
    """
    k = MICRO_BATCHES
    given = subject.grad.clone()
    subject.sums.clear()
    total, magnitude = (torch.zeros_like(given, dtype=torch.float64) for _ in range(2))
    for index in range(k):
        subject.grad.copy_(given.roll(17 * index) * (1, -0.3, 2.5)[index])
        total += subject.grad.double()
        magnitude += subject.grad.double().abs()
        subject.backward()
    subject.grad.copy_(given)
    found = torch.cat([grad.flatten() for grad in subject.sums.grads()])
    bound = (k + 1) * subject.way.unit_roundoff * magnitude + k * 2.0**-150
    share = float(((found.double() - total).abs() / bound).max())
    if not share <= 1:
        raise RuntimeError(f"expected an error of at most its bound, got {share:.3g} times that")
    return share


def check(subject: Subject) -> float | None:
    """Checks what a way does with gradients; returns the error over its bound."""
    if subject.way.role == "none":
        check_stored(subject)
        return None
    return check_sum(subject)


# The GPU's share


def busy_in_graph(subject: Subject) -> tuple[float, str]:
    """Returns the GPU time of a backward, from graphs of several, and the timer's name."""
    calls = min(MAX_GRAPH_CALLS, max(1, GRAPH_TENSORS // len(subject.params)))

    def warm_up() -> None:
        subject.sums.before()
        subject.backward()
        subject.sums.before()

    def step() -> None:
        for _ in range(calls):
            subject.backward()
            if subject.way.role == "none":
                subject.sums.before()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        graph = capture(step, warm_up)
    if any("graph is empty" in str(warning.message).lower() for warning in caught):
        return 0.0, "graph, empty"
    try:
        timing = time_replays(graph, calls=calls, seconds=0.1)
    finally:
        graph.reset()
    return timing.p50, timing.timer


def busy_profiled(subject: Subject) -> float | None:
    """Returns the profiler's sum of a backward's kernels; None where it sees none."""
    repetitions = 3
    subject.sums.before()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(repetitions):
            subject.backward()
        torch.cuda.synchronize()
    kernels = [e for e in profiled.key_averages() if e.device_type == DeviceType.CUDA]
    return sum(e.self_device_time_total for e in kernels) / repetitions or None


def busy(subject: Subject) -> tuple[float | None, str]:
    """Returns the GPU time of a backward, and by which timer, or why there is none."""
    if not subject.grad.is_cuda:
        return None, "no GPU"
    try:
        return busy_in_graph(subject)
    except Exception as error:
        reason = f"not captured: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
        report.say(f"{subject.way.name}: {reason}")
    try:
        torch.cuda.synchronize()
        time_us = busy_profiled(subject)
    except Exception as error:
        return None, f"{reason}; not profiled: {type(error).__name__}"
    return time_us, f"profiler; {reason}" if time_us else f"{reason}; the profiler saw no kernel"


# The run


def take_turns(subjects: Sequence[Subject], seconds: float) -> None:
    """Samples all ways, each first in its turn."""
    order = collections.deque(subjects)
    end = time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        while len(subjects[0].samples) < MIN_ROUNDS or time.perf_counter() < end:
            for subject in order:
                subject.turn()
            order.rotate()
    finally:
        gc.enable()


def by_round(subject: Subject, column: int) -> list[float]:
    """Returns the median of each round, of wall times (0) or the host's (1)."""
    return [statistics.median(s[column] for s in samples) for samples in subject.samples]


def row_of(subject: Subject, case: Case, share: float | None, baseline: Subject) -> dict:
    """Returns a way's figures for a case; times in microseconds."""
    n = len(case.shapes)
    flat = [sample for samples in subject.samples for sample in samples]
    p20, host, p80 = quantiles([sample[1] for sample in flat])
    wall = statistics.median(sample[0] for sample in flat)
    busy_us, timer = busy(subject)
    pairs = zip(by_round(subject, 1), by_round(baseline, 1), strict=True)
    over = statistics.median(own - none for own, none in pairs)
    return {
        "case": case.name,
        "tensors": n,
        "elements": case.elements,
        "arrival": case.arrival(subject.grad.device),
        "name": subject.way.name,
        "role": subject.way.role,
        "host_us": round(host, 3),
        "host_us_per_param": round(host / n, 4),
        "p20_us_per_param": round(p20 / n, 4),
        "p80_us_per_param": round(p80 / n, 4),
        "over_none_us_per_param": round(over / n, 4),
        "wall_us": round(wall, 3),
        "busy_us": None if busy_us is None else round(busy_us, 3),
        "busy_timer": timer,
        "idle_us": None if busy_us is None else round(wall - busy_us, 3),
        "error_over_bound": None if share is None else round(share, 4),
        "samples": len(flat),
    }


def run_case(case: Case, device: torch.device, seconds: float, failures: list[str]) -> list[dict]:
    """Returns the rows of a case."""
    generator = torch.Generator(device).manual_seed(1)
    grad = torch.randn(case.elements, device=device, generator=generator).bfloat16()
    subjects: list[Subject] = []
    shares: list[float | None] = []
    for way in ways(device):
        with report.survived(f"{case.name}, {way.name}", failures):
            subject = Subject(way, case, grad)
            share = check(subject)
            subjects.append(subject)
            shares.append(share)
    if not subjects or subjects[0].way.role != "none":
        return []
    release()
    take_turns(subjects, seconds)
    rows = []
    for subject, share in zip(subjects, shares, strict=True):
        rows.append(row_of(subject, case, share, subjects[0]))
        r = rows[-1]
        report.say(
            f"{case.name}, {r['name']}: host {r['host_us_per_param']:.3f} us a parameter, "
            f"{r['over_none_us_per_param']:.3f} over no hook"
        )
    return rows


def targets(rows: Sequence[dict], device: torch.device) -> list[dict]:
    """Returns what the C++ hook was to cost, and what it did; on a GPU alone."""
    if device.type != "cuda":
        return []
    found = []
    for r in rows:
        if r["role"] == "ours" and r["tensors"] > 1 and r["arrival"] in TARGETS_US:
            target, measured = TARGETS_US[r["arrival"]], r["over_none_us_per_param"]
            found.append(
                {
                    "case": r["case"],
                    "what": f"C++ hook, {r['arrival']}, us a parameter over no hook",
                    "target_us": target,
                    "measured_us": measured,
                    "met": measured <= target,
                }
            )
    return found


def number(value: float | None, digits: int) -> str:
    """Returns a number, or nothing."""
    return "" if value is None else f"{value:.{digits}f}"


def summary(rows: Sequence[dict], found: Sequence[dict]) -> str:
    """Returns the tables that a run ends with."""
    columns = {
        "case": lambda r: r["case"],
        "gradients": lambda r: r["name"],
        "C++ hook": lambda r: r["arrival"],
        "host us/param": lambda r: number(r["host_us_per_param"], 3),
        "p20": lambda r: number(r["p20_us_per_param"], 3),
        "p80": lambda r: number(r["p80_us_per_param"], 3),
        "over no hook": lambda r: number(r["over_none_us_per_param"], 3),
        "wall us": lambda r: number(r["wall_us"], 1),
        "busy us": lambda r: number(r["busy_us"], 1),
        "idle us": lambda r: number(r["idle_us"], 1),
        "error/bound": lambda r: number(r["error_over_bound"], 3),
    }
    target_columns = {
        "case": lambda r: r["case"],
        "target": lambda r: r["what"],
        "at most us": lambda r: number(r["target_us"], 1),
        "measured us": lambda r: number(r["measured_us"], 3),
        "met": lambda r: "yes" if r["met"] else "no",
    }
    skipped = [f"{r['case']}, {r['name']}: {r['busy_timer']}" for r in rows if is_odd(r)]
    parts = [report.table(rows, columns, n_text=3), "\n".join(skipped)]
    parts.append(
        report.table(found, target_columns, n_text=2)
        if found
        else "no targets: they are those of a GPU"
    )
    return "\n\n".join(filter(None, parts))


def is_odd(row: dict) -> bool:
    """Tells whether the GPU's time is not from a graph, where there is a GPU."""
    return row["busy_timer"] != "no GPU" and not row["busy_timer"].startswith("graph")


def launch_us(device: torch.device) -> float | None:
    """Returns what the host spends to launch one kernel that does nothing; None on the CPU."""
    if device.type != "cuda":
        return None
    samples = []
    for _ in range(200):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.cuda._sleep(0)
        samples.append((time.perf_counter() - begin) * 1e6)
    return round(statistics.median(samples), 3)


def run(options: argparse.Namespace, device: torch.device, failures: list[str]) -> None:
    """Measures all cases; saves after each."""
    measured_with = environment(device)
    launch = launch_us(device)
    rows: list[dict] = []
    found: list[dict] = []
    for case in cases(device.type == "cuda"):
        with report.survived(case.name, failures):
            rows += run_case(case, device, 1.0 if options.quick else 3.0, failures)
        release()
        found = targets(rows, device)
        if options.json:
            extra = {"method": METHOD, "launch_us": launch, "targets": found}
            report.save(options.json, measured_with, rows, **extra)
    if rows:
        print(summary(rows, found))
        print(f"\nlaunch of an empty kernel: {launch} us of the host" if launch else "")


def main() -> None:
    """Runs what was asked for; prints tables, and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, help="results file to write", metavar="PATH")
    options = parser.parse_args()
    device = torch.device(report.device(parser, options.device))
    failures: list[str] = []
    # All on the stream of the captures: autograd's nodes keep that on which they were made.
    on_stream = (
        torch.cuda.stream(capture_stream()) if device.type == "cuda" else contextlib.nullcontext()
    )
    with on_stream:
        run(options, device, failures)
    report.end(failures)


if __name__ == "__main__":
    main()
