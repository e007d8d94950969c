"""The kernels and their peers: main += scale * grad, from 16-bit gradients into fp32, one tensor.

    python benchmarks/bench_accumulate.py --json benchmarks/results/accumulate_h200.json

Every way is checked against float64 arithmetic before it is timed, with cold caches, and with the
gradient just written (see accumulate_ways.py). GB/s come from the bytes that a way has to move, and
are set against a copy measured in the same run.

On the CPU a copy also reads the lines that it overwrites, which no declared byte counts, so shares
above 1 are possible. torch's adds of mixed dtypes make a float32 temporary there: a large one is
fresh pages from malloc on every call, whose faults take most of the time; a small one is not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import report
import targets
import torch
from accumulate_ways import (
    Case,
    Way,
    add_way,
    compiled_ways,
    copy_gb_per_s,
    copy_way,
    fast_backends,
    fp32_ways,
    our_ways,
    peer_ways,
    rows_of,
    single_tensor_ways,
    why_too_large,
)
from environment import environment
from timing import release

SIZES = {
    "cuda": "10,12,14,16,18,20,22,24,26,28,30,31+8",
    "cpu": "20,24",
}
FP16_SIZES = {"cuda": "20,24,28", "cpu": "20,24"}
WARM = 1 << 28  # elements of the largest tensor that is timed with a warm gradient
HUGE = 1 << 31  # elements from which on few ways are timed
BYTES = 10  # of memory per element that the greediest way needs: it makes a float32 copy
LAST = "2^31+8"


def sizes(text: str) -> dict[str, int]:
    """Parses sizes as in 20,31+8: a power of two, and what is added to it; returns them by name."""
    found = {}
    for size in filter(None, text.split(",")):
        log2, _, rest = size.partition("+")
        found[f"2^{size}"] = 2 ** int(log2) + int(rest or 0)
    return found


def ways_of(
    numel: int, dtype: torch.dtype, backends: Sequence[str], device: torch.device
) -> list[Way]:
    """Returns the ways of one size."""
    ours = [way for backend in backends for way in our_ways(backend, is_list=False)]
    if numel >= HUGE:
        return [*ours, add_way(), copy_way()]
    ways = [*ours, *peer_ways(), *single_tensor_ways(), *compiled_ways(device)]
    return ways + (fp32_ways() if dtype == torch.bfloat16 else [])  # once for all dtypes


def run_case(
    name: str,
    numel: int,
    dtype: torch.dtype,
    backends: Sequence[str],
    device: torch.device,
    failures: list[str],
) -> list[dict]:
    """Returns the rows of one size and one dtype."""
    reason = why_too_large(numel, BYTES, device)
    if reason is not None:
        print(f"without {name}: {reason}", file=sys.stderr)
        return []
    caches = ["cold", "warm"] if numel <= WARM else ["cold"]
    case = Case([(numel,)], dtype, device)
    ways = ways_of(numel, dtype, backends, device)
    return rows_of(name, case, ways, caches, dtype, failures)


def cpu_targets_of(rows: Sequence[dict]) -> list[dict]:
    """Returns the targets of the CPU kernel on one tensor of 2^24 elements."""
    headline, peer = "accumulate_ + grad_stats", "main.add_(grad)"

    def row(name: str, backend: str = "torch", dtype: str = "bf16"):
        return targets.find(rows, name=name, backend=backend, dtype=dtype, case="2^24")

    ours, same = row(headline, "cpu"), row("main.add_(fp32 grad)", dtype="fp32")
    return [
        targets.target(
            f"{headline}: bandwidth / main.add_(fp32 grad)'s",
            targets.ratio(ours, same, "gb_per_s"),
            0.8,
        ),
        targets.target(f"{peer} / {headline}: time", targets.ratio(row(peer), ours, "p50_us"), 7),
    ]


def targets_of(rows: Sequence[dict]) -> list[dict]:
    """Returns the targets of the kernels on one tensor, of 2^28 elements unless named."""
    if any(row["backend"] == "cpu" for row in rows):
        return cpu_targets_of(rows)

    def row(name: str, backend: str = "cuda", dtype: str = "bf16", case: str = "2^28"):
        return targets.find(rows, name=name, backend=backend, dtype=dtype, case=case)

    headline = "accumulate_ + grad_stats"
    ours, share = row(headline), "share_of_copy"
    add = row("main.add_(grad)", "torch")
    chain = row("main.add_(grad) + unscale, check + norm", "torch")
    same = targets.ratio(row(headline, case=LAST), row(headline, case="2^30"), "gb_per_s")
    return [
        targets.target(f"{headline}, bf16: share of copy", targets.value(ours, share), 0.98),
        targets.target(
            f"{headline}, fp16: share of copy",
            targets.value(row(headline, dtype="fp16"), share),
            0.98,
        ),
        targets.target(
            "accumulate_ (store), bf16, 6 B: share of copy",
            targets.value(row("accumulate_ (store)"), share),
            0.96,
        ),
        targets.target(
            f"main.add_(grad) / {headline}: time", targets.ratio(add, ours, "p50_us"), 1.45
        ),
        targets.target(
            f"add_, unscale, check, norm / {headline}: time",
            targets.ratio(chain, ours, "p50_us"),
            2.95,
        ),
        targets.target(
            f"{headline}, triton: share of copy",
            targets.value(row(headline, "triton"), share),
            0.94,
        ),
        # It is in the rows only if it was right.
        targets.target(f"{headline}, {LAST}: bandwidth / that of 2^30", same, 0.97),
    ]


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument(
        "--sizes", type=sizes, help="log2 of the sizes in bfloat16", metavar="20,28,31+8"
    )
    parser.add_argument(
        "--fp16-sizes", type=sizes, help="the same in float16, or nothing", metavar="20,28"
    )
    parser.add_argument("--json", type=Path, help="results file to write", metavar="PATH")
    options = parser.parse_args()
    options.device = report.device(parser, options.device)
    if options.fp16_sizes is None:
        default = sizes(FP16_SIZES[options.device])
        options.fp16_sizes = {
            name: numel
            for name, numel in default.items()
            if options.sizes is None or name in options.sizes
        }
    if options.sizes is None:
        options.sizes = sizes(SIZES[options.device])
    return options


def main() -> None:
    """Runs all cases; prints the tables, and writes the results file."""
    options = parse_arguments()
    device = torch.device(options.device)
    backends = fast_backends(device)
    measured_with = environment(device)
    copy = copy_gb_per_s(device)
    release()
    rows, failures = [], []
    for name in options.sizes | options.fp16_sizes:
        for dtype, chosen in (
            (torch.bfloat16, options.sizes),
            (torch.float16, options.fp16_sizes),
        ):
            if name in chosen:
                report.say(f"{name} {dtype}")
                rows += run_case(name, chosen[name], dtype, backends, device, failures)
                release()
    report.finish_against_copy(rows, copy, targets_of, measured_with, options.json, failures)


if __name__ == "__main__":
    main()
