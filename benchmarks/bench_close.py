"""What closing a window costs: overflow check, unscaling, norm, clipping, optimizer step.

    python benchmarks/bench_close.py --json benchmarks/results/close_h200.json

Parameters of the shapes of Llama-3.2-1B in float32, with float32 gradients, as autocast trains
them. torch: GradScaler.unscale_ and clip_grad_norm_, without and with the step of fused AdamW.
Ours: Accumulator.clip_grad_norm_ and Accumulator.step, from statistics that are valid, and from
ones that must be computed anew. Clipping is due or not, as named. Each way's norm is checked
against float64. "GPU" is a replayed graph of the close; "wall" is between two events around one
call, launches included. Bytes are what a way has to move, by its passes over the gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from environment import environment
from shapes import llama_1b
from torch import Tensor

import gradacc_kernels as gk

NEVER, ALWAYS = 1e30, 1e-3  # max_norm
ADAMW_BYTES = 28  # reads parameter, gradient and two averages, writes all but the gradient


class Close:
    """Parameters with gradients, attached or not, and what closes their window."""

    def __init__(self, is_attached: bool):
        torch.manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(s, device="cuda") * 0.02) for s in llama_1b()]
        self.accumulator = gk.attach(self.params) if is_attached else None
        self.scaler = torch.amp.GradScaler("cuda", init_scale=1.0, growth_interval=1 << 30)
        self.scaler.scale(torch.zeros((), device="cuda"))
        self.optimizer = torch.optim.AdamW(self.params, lr=0.0, fused=True, capturable=True)
        self.arrive()

    def arrive(self) -> None:
        """Gives every parameter a gradient, by backward."""
        for param in self.params:
            param.grad = None
        for param in self.params:
            (param * 0.5).square().sum().backward()

    def norm(self) -> float:
        """In float64."""
        return sum(p.grad.double().square().sum() for p in self.params).sqrt().item()

    def torch_clip(self, max_norm: float) -> Tensor:
        """What loops with a GradScaler call before the step."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.params, max_norm)
        self.scaler._per_optimizer_states.clear()
        return norm

    def torch_step(self, max_norm: float) -> Tensor:
        """The same, and the step."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.params, max_norm)
        self.scaler.step(self.optimizer)
        self.scaler._per_optimizer_states.clear()
        return norm


def wall(close: Close, call: Callable[[], Tensor], repeats: int) -> float:
    """Milliseconds of a call, each after gradients have arrived."""
    times = []
    for _ in range(repeats):
        close.arrive()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def gpu(close: Close, call: Callable[[], Tensor], repeats: int) -> float:
    """Milliseconds of a replay of the call's graph."""
    close.arrive()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(repeats):
        if close.accumulator is not None:
            close.arrive()  # into the same memory; what was clipped is due again
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


class Table:
    """The rows, each timed and printed as it is asked for."""

    def __init__(self, repeats: int):
        self.repeats = repeats
        self.rows: list[dict] = []

    def add(self, name: str, close: Close, call: Callable[[], Tensor], n_bytes: int) -> None:
        """Times one way; stops where its norm is wrong."""
        close.arrive()
        expected = close.norm()
        norm = call().item()
        if abs(norm - expected) > 1e-4 * expected:
            raise SystemExit(f"{name}: norm {norm}, expected {expected}")
        wall(close, call, 2)
        row = {
            "way": name,
            "wall_ms": wall(close, call, self.repeats),
            "gpu_ms": gpu(close, call, self.repeats),
            "bytes_per_element": n_bytes,
        }
        self.rows.append(row)
        print(
            f"{name:44} {row['wall_ms']:8.3f} ms wall {row['gpu_ms']:8.3f} ms GPU {n_bytes:4} B",
            flush=True,
        )


def time_torch(table: Table, max_norm: float, due: str) -> None:
    """torch's chain, without and with the step."""
    close = Close(False)
    table.add(f"torch: unscale, clip ({due})", close, lambda: close.torch_clip(max_norm), 20)
    table.add(
        f"torch: close with fused AdamW ({due})",
        close,
        lambda: close.torch_step(max_norm),
        20 + ADAMW_BYTES,
    )


def time_ours(table: Table, max_norm: float, due: str) -> None:
    """The Accumulator's, from valid statistics and anew."""
    close = Close(True)
    accumulator = close.accumulator

    def clip():
        return accumulator.clip_grad_norm_(max_norm)

    def step():
        return accumulator.step(close.optimizer, max_norm=max_norm)

    def anew(call):
        accumulator.invalidate()
        return call()

    clipping = 8 if max_norm == ALWAYS else 0
    stepping = clipping + ADAMW_BYTES
    table.add(f"ours: clip ({due})", close, clip, clipping)
    table.add(f"ours: clip, norm anew ({due})", close, lambda: anew(clip), clipping + 4)
    table.add(f"ours: step with fused AdamW ({due})", close, step, stepping)
    table.add(f"ours: step, norm anew ({due})", close, lambda: anew(step), stepping + 4)


def main() -> None:
    """Times all ways; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    table = Table(options.repeats)
    for max_norm, due in ((NEVER, "not due"), (ALWAYS, "due")):
        for part in (time_torch, time_ours):
            part(table, max_norm, due)
            torch.cuda.empty_cache()
    if options.json:
        result = {"environment": environment(torch.device("cuda")), "rows": table.rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
