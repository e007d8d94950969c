"""The kernels on lists of tensors, and their peers: main += scale * grad for each pair of a list.

    python benchmarks/bench_multi_tensor.py --json benchmarks/results/multi_tensor_h200.json

The lists are those of shapes.py. As bench_accumulate.py otherwise: checked against float64, cold
caches, and for lists that fit into L2 also with the gradients just written (by one kernel for all).
Small lists are timed in a CUDA graph too, which has no launch cost of the host. A loop of more
launches than the GPU's queue holds is timed in a graph and, in place of events, on the wall.
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
    copy_gb_per_s,
    fast_backends,
    our_ways,
    peer_ways,
    rows_of,
    why_too_large,
)
from environment import environment
from shapes import SHAPES, numel
from timing import release

LISTS = {"cuda": list(SHAPES), "cpu": ["resnet-50", "400x2048", "10000x16"]}
BYTES = 6  # of memory per element: a main gradient and a 16-bit one, allocated way by way


def list_names(text: str) -> list[str]:
    """Parses --lists."""
    names = [name for name in text.split(",") if name]
    if not set(names) <= set(SHAPES):
        raise argparse.ArgumentTypeError(f"expected names of {', '.join(SHAPES)}, got {text}")
    return names


def l2_bytes(device: torch.device) -> int:
    """Returns the size of the cache that a list may fit into: the GPU's, none on the CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def run_case(
    name: str, backends: Sequence[str], device: torch.device, failures: list[str]
) -> list[dict]:
    """Returns the rows of one list, in bfloat16."""
    shapes = SHAPES[name]
    reason = why_too_large(numel(shapes), BYTES, device)
    if reason is not None:
        print(f"without {name}: {reason}", file=sys.stderr)
        return []
    caches = ["cold", "warm"] if BYTES * numel(shapes) <= l2_bytes(device) else ["cold"]
    ways = [way for backend in backends for way in our_ways(backend, is_list=True)] + peer_ways()
    case = Case(shapes, torch.bfloat16, device)
    return rows_of(name, case, ways, caches, torch.bfloat16, failures)


def targets_of(rows: Sequence[dict]) -> list[dict]:
    """Returns the targets of the kernels on lists."""
    headline = "multi_accumulate_ + grad_stats"

    def ours(case: str, key: str, backend: str = "cuda") -> float | None:
        return targets.value(targets.find(rows, name=headline, case=case, backend=backend), key)

    few, many = "400x2048", "10000x16"
    loop = targets.find(rows, name="main.add_(grad)", case=few, backend="torch")
    times = targets.ratio(
        targets.find(rows, name=headline, case=few, backend="cuda"), loop, "p50_us"
    )
    share, p50 = "share_of_copy", "p50_us"
    return [
        *(
            targets.target(f"{name}: share of copy", ours(name, share), bound)
            for name, bound in (
                ("llama-3.2-1b", 0.96),
                ("llama-3-8b", 0.96),
                ("gpt2", 0.90),
                ("resnet-50", 0.90),
            )
        ),
        targets.target(f"{few}: us", ours(few, p50), 12, at_most=True),
        targets.target(f"{few}: time / that of a loop of add_", times, 0.01, at_most=True),
        targets.target(f"{many}: us", ours(many, p50), 150, at_most=True),
        targets.target(
            "llama-3.2-1b, triton: share of copy", ours("llama-3.2-1b", share, "triton"), 0.90
        ),
    ]


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument(
        "--lists", type=list_names, help="lists of tensors", metavar=",".join(SHAPES)
    )
    parser.add_argument("--json", type=Path, help="results file to write", metavar="PATH")
    options = parser.parse_args()
    options.device = report.device(parser, options.device)
    if options.lists is None:
        options.lists = LISTS[options.device]
    return options


def main() -> None:
    """Runs all lists; prints the tables, and writes the results file."""
    options = parse_arguments()
    device = torch.device(options.device)
    backends = fast_backends(device)
    measured_with = environment(device)
    copy = copy_gb_per_s(device)
    release()
    rows, failures = [], []
    for name in options.lists:
        report.say(name)
        rows += run_case(name, backends, device, failures)
        release()
    report.finish_against_copy(rows, copy, targets_of, measured_with, options.json, failures)


if __name__ == "__main__":
    main()
