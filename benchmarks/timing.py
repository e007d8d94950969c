"""Timers for GPU and CPU. All times are in microseconds, for one call.

A timer takes a list of calls that do the same work on different memory, and goes round it: with
``rotation(bytes_per_call)`` of them, caches hold nothing of a call's memory when its turn comes
again.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Calls = Sequence[Callable[[], object]]

COLD_BYTES = 256 << 20  # four times the L2 of an H200
MAX_CLOCK_HZ = 3e9  # no GPU's clock is higher, so a spin lasts at least as long as was asked for
REPLAYS = 0.12  # seconds of replays, of 7 to 25, of a graph whose time is taken from another's
MAX_HOLD = 1.0  # seconds of a spin; a queue that is full holds the host for as long as the spin


@dataclass(frozen=True)
class Timing:
    """Quantiles of the time of one call.

    Attributes:
        timer: "events" or "graph" for GPU time, with ", host-bound" where the host was too slow
            to keep launch cost out of it; "wall" for what a clock on the wall shows.
        p20: microseconds, as p50 and p80.
        p50: median.
        p80: see p20.
        host: what the host spends to launch one call, the median, or the least with graphs; None
            where that is all.
    """

    timer: str
    p20: float
    p50: float
    p80: float
    host: float | None = None


def release() -> None:
    """Frees the memory of what was measured last, once nothing refers to it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Returns p20, p50 and p80."""
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return p20, statistics.median(samples), p80


def rotation(bytes_per_call: float) -> int:
    """Returns how many sets of buffers keep every call out of the caches."""
    return max(1, -(-COLD_BYTES // int(bytes_per_call)))


def _time_on_gpu(
    timer: str,
    issue: Callable[[], object],
    calls_per_issue: int,
    repetitions: int,
    *,
    before: Callable[[], object] | None = None,
    seconds: float = float("inf"),
) -> Timing:
    """Times what ``issue`` puts on the stream, each time after ``before``, which is not timed.

    After ``seconds`` it ends with 3 samples in place of ``repetitions``.

    A spinning kernel holds the stream until everything is queued, so that the events see the GPU's
    time alone. Repetitions whose launches outlasted the spin are left out. If all did (the calls
    wait for the device, or are more than its queue of about 1000 holds), the timer says so.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    hold = 1e-3
    ahead: list[tuple[float, float]] = []
    behind: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(ahead) < repetitions and len(behind) < repetitions:
        if time.perf_counter() > end:
            repetitions = min(repetitions, 3)
            if max(len(ahead), len(behind)) >= repetitions:
                break
        torch.cuda.synchronize()
        torch.cuda._sleep(int(hold * MAX_CLOCK_HZ))
        queued = time.perf_counter()
        if before is not None:
            before()
        start.record()
        begin = time.perf_counter()
        issue()
        launch = time.perf_counter() - begin
        stop.record()
        held = time.perf_counter() - queued
        torch.cuda.synchronize()
        is_ahead = held < hold
        hold = min(MAX_HOLD, max(hold, 2 * held))
        sample = start.elapsed_time(stop) * 1e3 / calls_per_issue, launch * 1e6 / calls_per_issue
        (ahead if is_ahead else behind).append(sample)
    if len(ahead) < repetitions:
        timer, ahead = f"{timer}, host-bound", behind
    gpu, host = zip(*ahead, strict=True)
    return Timing(timer, *quantiles(gpu), statistics.median(host))


def time_cuda(
    calls: Calls,
    *,
    calls_per_event: int = 1,
    repetitions: int = 25,
    before: Callable[[], object] | None = None,
    seconds: float = float("inf"),
) -> Timing:
    """Returns the GPU time of one call, between events, without the cost of its launches.

    Args:
        calls: see the module; each runs once before timing starts.
        calls_per_event: calls between two events; for times not far above a microsecond.
        repetitions: samples.
        before: runs before the first of the two events, each time.
        seconds: after which 3 samples are enough.
    """
    for call in calls:
        call()
    turn = itertools.cycle(calls)

    def issue():
        for _ in range(calls_per_event):
            next(turn)()

    return _time_on_gpu(
        "events", issue, calls_per_event, repetitions, before=before, seconds=seconds
    )


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """Returns the one stream of all captures: cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream()


def capture(
    step: Callable[[], object], warm_up: Callable[[], object] | None = None
) -> torch.cuda.CUDAGraph:
    """Returns a CUDA graph of ``step``, captured on a stream that is not the current one.

    Args:
        step: waits for nothing on the device, and works on the same memory each time.
        warm_up: runs once before, on the same stream, so that workspaces and autograd's nodes
            are of that stream; None for ``step`` itself.
    """
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        (warm_up or step)()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph


def time_replays(
    graph: torch.cuda.CUDAGraph,
    *,
    calls: int = 1,
    seconds: float = 0.8,
    min_repetitions: int = 7,
    max_repetitions: int = 25,
) -> Timing:
    """Returns the GPU time of one of the ``calls`` in a graph; samples for about ``seconds``.

    Replays follow each other, so that each is launched while the one before it runs, and events
    between them see the GPU's time alone. Where the host is too slow for that, the timer says so.
    """
    graph.replay()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    graph.replay()
    launches = [(time.perf_counter() - begin) * 1e6 / calls]
    torch.cuda.synchronize()
    once = time.perf_counter() - begin
    repetitions = max(min_repetitions, min(max_repetitions, int(seconds / once)))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    graph.replay()
    for event in events[:-1]:
        event.record()
        begin = time.perf_counter()
        graph.replay()
        launches.append((time.perf_counter() - begin) * 1e6 / calls)
    events[-1].record()
    torch.cuda.synchronize()
    gpu = [a.elapsed_time(b) * 1e3 / calls for a, b in itertools.pairwise(events)]
    # Launches wait where the device has enough in its queue: the shortest did so the least.
    host = min(launches)
    timer = "graph" if host < statistics.median(gpu) else "graph, host-bound"
    return Timing(timer, *quantiles(gpu), host)


def time_difference(
    whole: Callable[[], object], rest: Callable[[], object] | None, *, calls: int
) -> Timing:
    """Returns the GPU time of one of the ``calls`` that ``whole`` makes and ``rest`` does not.

    Both are replayed as CUDA graphs; the median time of ``rest`` is taken from each quantile of
    ``whole``. The host's part is that of the whole graph.

    Raises:
        RuntimeError: the calls took no time beyond the noise of the rest.
    """
    timing = time_replays(capture(whole), calls=calls, seconds=REPLAYS)
    if rest is None:
        return timing
    other = time_replays(capture(rest), calls=calls, seconds=REPLAYS).p50
    p20, p50, p80 = (quantile - other for quantile in (timing.p20, timing.p50, timing.p80))
    if p50 <= 0:
        raise RuntimeError(f"the calls take no time: {timing.p50} us a call, {other} without them")
    return dataclasses.replace(timing, p20=p20, p50=p50, p80=p80)


def time_cpu(
    calls: Calls,
    *,
    before: Sequence[Callable[[], object]] = (),
    seconds: float = 0.3,
    min_repetitions: int = 7,
    max_repetitions: int = 200,
) -> Timing:
    """Returns the wall time of one call; samples for about ``seconds``.

    Each call runs after its own of ``before``, if there are any, whose time is not counted.
    """
    for call in calls:
        call()
    samples: list[float] = []
    turn = itertools.cycle(zip(before or len(calls) * [lambda: None], calls, strict=True))
    end = time.perf_counter() + seconds
    while len(samples) < max_repetitions:
        prepare, call = next(turn)
        prepare()
        begin = time.perf_counter()
        call()
        now = time.perf_counter()
        samples.append((now - begin) * 1e6)
        if now > end and len(samples) >= min_repetitions:
            break
    return Timing("wall", *quantiles(samples))


def sample_wall(
    call: Callable[[], object],
    *,
    seconds: float,
    min_repetitions: int = 7,
    max_repetitions: int = 200,
    before: Callable[[], object] | None = None,
) -> list[tuple[float, float]]:
    """Returns (wall, host) microseconds of single calls; samples for about ``seconds``.

    ``before`` runs before each call, and has ended when the clock starts.

    The wall time ends when the device has finished, the host's part when the call returns: where
    the two are close, the device waited for the host.
    """
    is_cuda = torch.cuda.is_available()
    samples: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(samples) < min_repetitions or (
        len(samples) < max_repetitions and time.perf_counter() < end
    ):
        if before is not None:
            before()
            if is_cuda:
                torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        returned = time.perf_counter()
        if is_cuda:
            torch.cuda.synchronize()
        done = time.perf_counter()
        samples.append(((done - begin) * 1e6, (returned - begin) * 1e6))
    return samples


def wall_timing(samples: Sequence[tuple[float, float]], calls: int = 1) -> Timing:
    """Returns the timing of one of the ``calls`` in each of the samples of sample_wall."""
    wall, host = ([value / calls for value in column] for column in zip(*samples, strict=True))
    return Timing("wall", *quantiles(wall), statistics.median(host))
