"""Timers for GPU and CPU. All times are in microseconds, for one call.

A timer takes a list of calls that do the same work on different memory, and goes round it: with
``rotation(bytes_per_call)`` of them, caches hold nothing of a call's memory when its turn comes
again.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Calls = Sequence[Callable[[], object]]

COLD_BYTES = 256 << 20  # four times the L2 of an H200
MAX_CLOCK_HZ = 3e9  # no GPU's clock is higher, so a spin lasts at least as long as was asked for


@dataclass(frozen=True)
class Timing:
    """Quantiles of the time of one call.

    Attributes:
        timer: "events" or "graph" for GPU time, with ", host-bound" where the host was too slow
            to keep launch cost out of it; "wall" for the CPU.
        p20: microseconds, as p50 and p80.
        p50: median.
        p80: see p20.
        host: median of what the host spends to launch one call; None on the CPU.
    """

    timer: str
    p20: float
    p50: float
    p80: float
    host: float | None = None


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Returns p20, p50 and p80."""
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return p20, statistics.median(samples), p80


def rotation(bytes_per_call: float) -> int:
    """Returns how many sets of buffers keep every call out of the caches."""
    return max(1, -(-COLD_BYTES // int(bytes_per_call)))


def _time_on_gpu(
    timer: str, issue: Callable[[], object], calls_per_issue: int, repetitions: int
) -> Timing:
    """Times what ``issue`` puts on the stream.

    A spinning kernel holds the stream until everything is queued, so that the events see the GPU's
    time alone. Repetitions whose launches outlasted the spin are left out. If all did (the calls
    wait for the device, or are more than its queue of about 1000 holds), the timer says so.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    hold = 1e-3
    ahead: list[tuple[float, float]] = []
    behind: list[tuple[float, float]] = []
    while len(ahead) < repetitions and len(behind) < repetitions:
        torch.cuda.synchronize()
        torch.cuda._sleep(int(hold * MAX_CLOCK_HZ))
        start.record()
        begin = time.perf_counter()
        issue()
        launch = time.perf_counter() - begin
        stop.record()
        torch.cuda.synchronize()
        is_ahead = launch < hold
        hold = max(hold, 2 * launch)
        sample = start.elapsed_time(stop) * 1e3 / calls_per_issue, launch * 1e6 / calls_per_issue
        (ahead if is_ahead else behind).append(sample)
    if len(ahead) < repetitions:
        timer, ahead = f"{timer}, host-bound", behind
    gpu, host = zip(*ahead, strict=True)
    return Timing(timer, *quantiles(gpu), statistics.median(host))


def time_cuda(calls: Calls, *, calls_per_event: int = 1, repetitions: int = 25) -> Timing:
    """Returns the GPU time of one call, between events, without the cost of its launches.

    Args:
        calls: see the module; each runs once before timing starts.
        calls_per_event: calls between two events; for times not far above a microsecond.
        repetitions: samples.
    """
    for call in calls:
        call()
    turn = itertools.cycle(calls)

    def issue():
        for _ in range(calls_per_event):
            next(turn)()

    return _time_on_gpu("events", issue, calls_per_event, repetitions)


def time_cuda_graph(calls: Calls, *, repetitions: int = 25) -> Timing:
    """Returns the GPU time of one call, from replays of a CUDA graph that holds all calls once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return _time_on_gpu("graph", graph.replay, len(calls), repetitions)


def time_cpu(
    calls: Calls, *, seconds: float = 0.3, min_repetitions: int = 7, max_repetitions: int = 200
) -> Timing:
    """Returns the wall time of one call; samples for about ``seconds``."""
    for call in calls:
        call()
    samples: list[float] = []
    turn = itertools.cycle(calls)
    end = time.perf_counter() + seconds
    while len(samples) < max_repetitions:
        call = next(turn)
        begin = time.perf_counter()
        call()
        now = time.perf_counter()
        samples.append((now - begin) * 1e6)
        if now > end and len(samples) >= min_repetitions:
            break
    return Timing("wall", *quantiles(samples))
