"""What it costs to look: windows of a Llama with a Monitor, or a NoiseScale, and without.

    python benchmarks/bench_monitor.py --json benchmarks/results/monitor_h200.json

A window is K micro-batches of T tokens, bfloat16 parameters, and Accumulator.step with clipping
over gk.MasterParams of fused SGD. Ways take turns, a window each; times are of a clock on the wall.
Windows vary by more than what is looked for, so the calls that look are timed by themselves: on the
host in each window, and on the GPU behind a kernel that keeps it busy until all is launched. Their
overhead is the longer of the two, which hides the other, over the time of a micro-batch. Under
torch's sync debug mode no window of any way may wait for the device, its step included.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import llama
import report
import targets
import torch
from environment import environment
from timing import release

import gradacc_kernels as gk

SHAPES = {
    "cuda": llama.Shape(),
    "cpu": llama.Shape(256, width=64, layers=2, heads=4, kv_heads=2, mlp=128, positions=64),
}
TOKENS = {"cuda": 1024, "cpu": 16}
MOST = 0.01  # of a micro-batch, for a Monitor
SLEEP = 20_000_000  # cycles of the GPU, about 10 ms: longer than the host takes to look
METHOD = {
    "window": "K micro-batches and Accumulator.step(max_norm=1.0), MasterParams(SGD)",
    "time": "wall clock, median; ways in turns",
    "looking": "of a window's calls that look: host clock, mean; events on the GPU, median",
    "overhead": "the longer of both over the median of a micro-batch without",
}


class Loop:
    """A training loop.

    Args:
        name: "nothing", "Monitor" or "NoiseScale".
        folder: for what is written.
    """

    def __init__(self, name: str, device: torch.device, count: int, folder: Path):
        self.name, self.count = name, count
        self.model = llama.build(SHAPES[device.type], torch.bfloat16, device)
        self.accumulator = gk.attach(self.model, scale=1 / count)
        params = self.model.parameters()
        self.optimizer = gk.MasterParams(params, torch.optim.SGD, lr=1e-4, fused=True)
        shape = SHAPES[device.type].vocabulary, (count, 1, TOKENS[device.type] + 1)
        self.text = torch.randint(*shape, device=device)
        self.monitor = self.noise = None
        self.looking = 0.0  # seconds of the host, in this window
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = None
        if name == "Monitor":
            self.monitor = gk.Monitor(self.accumulator, [gk.JsonLines(folder / "run.jsonl")])
            self.monitor.record = partial(self.look, self.monitor.record)  # which step() calls
        if name == "NoiseScale":
            self.noise = gk.NoiseScale(self.accumulator)

    def look(self, call: Callable, *args, **kwargs) -> None:
        """Times a call that looks: on the GPU, where there are events, or else on the host."""
        if self.events is None:
            began = time.perf_counter()
            call(*args, **kwargs)
            self.looking += time.perf_counter() - began
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP)
        begin.record()
        call(*args, **kwargs)
        end.record()
        self.events.append((begin, end))

    def window(self) -> None:
        """Runs one."""
        self.looking = 0.0
        for text in self.text:
            loss = self.model(text[:, :-1], text[:, 1:])
            loss.backward()
            if self.noise is not None:
                self.look(self.noise.observe, text.numel() - 1)
        if self.noise is not None:
            self.look(self.noise.update)
        if self.monitor is not None:
            self.look(self.monitor.log, loss=loss)
        self.accumulator.step(self.optimizer, max_norm=1.0)
        self.optimizer.zero_grad()

    def looking_on_the_gpu(self) -> float:
        """Seconds that the GPU has of what looks, in a window: the median of 5."""
        sums = []
        for _ in range(5):
            self.events = []
            self.window()
            torch.cuda.synchronize()
            sums.append(sum(begin.elapsed_time(end) for begin, end in self.events) / 1e3)
        self.events = None
        return statistics.median(sums)


def measure(device: torch.device, count: int, seconds: float, folder: Path) -> list[dict]:
    """Returns a row for each way."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    loops = [Loop(name, device, count, folder) for name in ("nothing", "Monitor", "NoiseScale")]
    for loop in loops:
        loop.window()
        loop.window()
        wait()
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            loop.window()
            torch.cuda.set_sync_debug_mode("default")
    on_the_gpu = [0.0 for _ in loops]
    if device.type == "cuda":
        on_the_gpu = [loop.looking_on_the_gpu() for loop in loops]
    looking: list[list[float]] = [[] for _ in loops]
    times: list[list[float]] = [[] for _ in loops]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for loop, samples, lookings in zip(loops, times, looking, strict=True):
            wait()
            began = time.perf_counter()
            loop.window()
            wait()
            samples.append(time.perf_counter() - began)
            lookings.append(loop.looking)
    medians = list(map(statistics.median, times))
    rows = []
    for loop, median, lookings, gpu_s in zip(loops, medians, looking, on_the_gpu, strict=True):
        host_s = statistics.mean(lookings)  # records of several windows are written in one
        row = {"way": loop.name, "tokens": TOKENS[device.type], "micro_batches": count}
        row |= {"window_s": median, "windows": len(times[0]), "host_s": host_s, "gpu_s": gpu_s}
        row["of_micro_batch"] = max(host_s, gpu_s) / (medians[0] / count)
        rows.append(row)
    return rows


COLUMNS: report.Columns = {
    "way": lambda r: r["way"],
    "T": lambda r: str(r["tokens"]),
    "K": lambda r: str(r["micro_batches"]),
    "window ms": lambda r: f"{1e3 * r['window_s']:.2f}",
    "host us": lambda r: f"{1e6 * r['host_s']:.0f}",
    "GPU us": lambda r: f"{1e6 * r['gpu_s']:.0f}",
    "of a micro-batch": lambda r: f"{r['of_micro_batch']:.2%}",
}


def main() -> None:
    """Measures, prints a table, and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--json", type=Path, help="results file to write")
    options = parser.parse_args()
    device = torch.device(report.device(parser, options.device))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 8):
            rows += measure(device, count, options.seconds / 2, Path(folder))
            release()
    title = f"T={TOKENS[device.type]}, Monitor, of a micro-batch"
    aimed_at = [
        targets.target(f"{title}, K={r['micro_batches']}", r["of_micro_batch"], MOST, at_most=True)
        for r in rows
        if r["way"] == "Monitor"
    ]
    print(report.table(rows, COLUMNS, n_text=1))
    print(targets.table(aimed_at))
    if options.json is not None:
        report.save(options.json, environment(device), rows, method=METHOD, targets=aimed_at)


if __name__ == "__main__":
    main()
