"""What it costs to look: windows of a Llama with a Monitor, or a NoiseScale, and without.

    python benchmarks/bench_monitor.py --json benchmarks/results/monitor_h200.json

A window is K micro-batches of T tokens, bfloat16 parameters, and Accumulator.step with clipping
over gk.MasterParams of fused SGD. Ways take turns, a window each; times are of a clock on the wall.
Overhead is the difference of medians, over the time of a micro-batch. Under torch's sync debug mode
no window of any way may wait for the device, its step included.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
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
METHOD = {
    "window": "K micro-batches and Accumulator.step(max_norm=1.0), MasterParams(SGD)",
    "time": "wall clock, median; ways in turns",
    "overhead": "difference of medians over the median of a micro-batch without",
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
        if name == "Monitor":
            self.monitor = gk.Monitor(self.accumulator, [gk.JsonLines(folder / "run.jsonl")])
        if name == "NoiseScale":
            self.noise = gk.NoiseScale(self.accumulator)

    def window(self) -> None:
        """Runs one."""
        for text in self.text:
            loss = self.model(text[:, :-1], text[:, 1:])
            loss.backward()
            if self.noise is not None:
                self.noise.observe(text.numel() - 1)
        if self.noise is not None:
            self.noise.update()
        if self.monitor is not None:
            self.monitor.log(loss=loss)
        self.accumulator.step(self.optimizer, max_norm=1.0)
        self.optimizer.zero_grad()


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
    times: list[list[float]] = [[] for _ in loops]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for loop, samples in zip(loops, times, strict=True):
            wait()
            began = time.perf_counter()
            loop.window()
            wait()
            samples.append(time.perf_counter() - began)
    medians = list(map(statistics.median, times))
    rows = []
    for loop, median in zip(loops, medians, strict=True):
        overhead = (median - medians[0]) / (medians[0] / count)
        row = {"way": loop.name, "tokens": TOKENS[device.type], "micro_batches": count}
        row |= {"window_s": median, "windows": len(times[0]), "of_micro_batch": overhead}
        rows.append(row)
    return rows


COLUMNS: report.Columns = {
    "way": lambda r: r["way"],
    "T": lambda r: str(r["tokens"]),
    "K": lambda r: str(r["micro_batches"]),
    "window ms": lambda r: f"{1e3 * r['window_s']:.2f}",
    "of a micro-batch": lambda r: f"{r['of_micro_batch']:+.2%}",
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
