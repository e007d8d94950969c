"""What bounds the elementwise kernels, by the GPU's counters: Nsight Compute over one call of each.

    python benchmarks/counters.py --json benchmarks/results/counters_h200.json

Memory traffic against the bytes that the work has to move, sectors a request (a warp's 16-byte
accesses to contiguous memory take 16), and how many of a processor's warps are there. Clocks are
left as they are. Needs ncu, and the right to read counters.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import render
import report
import shapes
import torch
from environment import environment

from gradacc_kernels import dispatch, ops

NUMEL = 1 << 28
METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__bytes_read.sum": "read_mb",
    "dram__bytes_write.sum": "written_mb",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio": "sectors_per_load",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio": "sectors_per_store",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
}
SCALES = {"us": {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3}}
BYTES = {"byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3}
SCALES |= {"read_mb": BYTES, "written_mb": BYTES}


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: for the table.
        mb: what it has to move, in megabytes.
        kernels: how many it launches; the first is the one that is told of.
        run: does it.
    """

    name: str
    mb: float
    kernels: int
    run: Callable[[], object]


def cases() -> list[Case]:
    """Returns the calls, on memory that they share."""
    main = torch.randn(NUMEL, device="cuda")
    grad = torch.randn(NUMEL, device="cuda", dtype=torch.bfloat16)
    half = grad.half()
    slots = torch.zeros(ops.num_chunks(NUMEL), device="cuda")
    other = torch.randn(NUMEL, device="cuda")
    factor = torch.tensor(0.5, device="cuda")
    found: list[Case] = []

    def add(name: str, bytes_per_element: float, run, *, numel: int = NUMEL, kernels: int = 1):
        found.append(Case(name, bytes_per_element * numel / 1e6, kernels, run))

    for backend in ("cuda", "triton"):
        if dispatch.why_missing(backend) is not None:
            continue
        for g, dtype in ((grad, "bf16"), (half, "fp16")):
            for store in (False, True):
                add(
                    f"accumulate_ {'store' if store else 'add'}, {dtype}, {backend}",
                    6 if store else 10,
                    lambda g=g, s=store, b=backend: ops.accumulate_(
                        main, g, store=s, partials=slots, backend=b
                    ),
                )
        for name in ("llama-3.2-1b", "resnet-50", "400x2048"):
            sizes = [shapes.numel([shape]) for shape in shapes.SHAPES[name]]
            numel = sum(sizes)
            mains = list(
                (main if numel <= NUMEL else torch.randn(numel, device="cuda"))[:numel].split(sizes)
            )
            grads = [torch.randn(n, device="cuda").bfloat16() for n in sizes]
            partials = [torch.zeros(ops.num_chunks(n), device="cuda") for n in sizes]
            add(
                f"multi_accumulate_ add, {name}, {backend}",
                10,
                lambda m=mains, g=grads, p=partials, b=backend: ops.multi_accumulate_(
                    m, g, partials=p, backend=b
                ),
                numel=numel,
            )
    add("grad_stats of main gradients, cuda", 4, lambda: ops.grad_stats([main]), kernels=2)
    add("scale_, cuda", 8, lambda: ops.scale_([main], factor))
    add("torch: main.add_(bf16)", 10, lambda: main.add_(grad))
    # In place of copy_, which is no kernel, and so is not seen.
    add("torch: neg of fp32", 8, lambda: torch.neg(other, out=main))
    return found


def work() -> None:
    """Runs under ncu: every call twice, the second one profiled."""
    for case in cases():
        case.run()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        case.run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        print(f"case\t{case.name}\t{case.mb}\t{case.kernels}", file=sys.stderr, flush=True)


def parse(text: str) -> list[dict]:
    """Returns the kernels of ncu's CSV, in the order of their launches."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        raise SystemExit("counters: ncu printed no table:\n" + "\n".join(lines[-20:]))
    kernels: dict[str, dict] = {}
    for entry in csv.DictReader(io.StringIO("\n".join(lines[begin:]))):
        kernel = kernels.setdefault(entry["ID"], {"kernel": entry["Kernel Name"].split("(")[0]})
        name = METRICS[entry["Metric Name"]]
        value = float(entry["Metric Value"].replace(",", ""))
        kernel[name] = value * SCALES.get(name, {}).get(entry["Metric Unit"], 1.0)
    return [kernels[key] for key in sorted(kernels, key=int)]


def rows_of(table: list[dict], cases: list[tuple[str, float, int]]) -> list[dict]:
    """Joins the kernels of ncu with the calls that launched them."""
    expected = sum(n_kernels for *_, n_kernels in cases)
    if len(table) != expected:
        raise SystemExit(f"counters: expected {expected} kernels, ncu saw {len(table)}")
    rows, next_kernel = [], iter(table)
    for name, mb, n_kernels in cases:
        first, *_ = [next(next_kernel) for _ in range(n_kernels)]
        moved = first["read_mb"] + first["written_mb"]
        rows.append(
            {
                "case": name,
                **{key: round(v, 3) if isinstance(v, float) else v for key, v in first.items()},
                "mb": round(mb, 3),
                "moved_over_needed": round(moved / mb, 4),
                "dram_gb_per_s": round(moved / first["us"] * 1e3, 1),
            }
        )
    return rows


def main() -> None:
    """Runs itself under ncu; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="results file to write", metavar="PATH")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work()
    if not torch.cuda.is_available() or shutil.which("ncu") is None:
        raise SystemExit("counters: needs a GPU that torch sees, and ncu on the PATH")
    command = ["ncu", "--csv", "--clock-control", "none", "--profile-from-start", "off"]
    command += ["--metrics", ",".join(METRICS), sys.executable, __file__, "--work"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"counters: ncu failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    named = [line.split("\t")[1:] for line in done.stderr.splitlines() if line[:5] == "case\t"]
    table = rows_of(parse(done.stdout), [(n, float(mb), int(k)) for n, mb, k in named])
    print(report.table(table, render.COUNTERS, n_text=1))
    if options.json:
        report.save(options.json, environment(torch.device("cuda")), table)


if __name__ == "__main__":
    main()
