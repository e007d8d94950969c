"""``python -m gradacc_kernels bench``: how fast each kernel is on this machine, by size.

    share = least seconds / seconds,    least seconds = max(bytes / copy, operations / product)

The rates of a copy, of as many bytes, and of a matrix product are measured in the same run. Tensors
below the size of the last cache stay in it, for a copy as for a kernel. ``--compare`` sets the
seconds of an earlier run, or of another machine, beside these.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import gradacc_kernels
from gradacc_kernels import dispatch
from gradacc_kernels.kernel_calls import calls, copy_rate, product_rate, seconds_of

FORMAT = 1
SIZES = {"cuda": (14, 18, 22, 26, 28), "cpu": (14, 18, 22)}


def environment(device: torch.device) -> dict[str, str]:
    """Returns what the figures are of."""
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": name,
        "torch": torch.__version__,
        "gradacc_kernels": gradacc_kernels.__version__,
    }


def measure(device: torch.device, backend: str, sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields a row for each kernel and size: elements, bytes, seconds, rates and the share."""
    product = product_rate(device)
    for log2 in sizes:
        for name, call in calls(1 << log2, backend, device).items():
            copy = copy_rate(call.nbytes, device)
            seconds = seconds_of(call.run, device)
            least = max(call.nbytes / copy, call.operations / product)
            yield {
                "kernel": name,
                "elements": 1 << log2,
                "bytes": call.nbytes,
                "seconds": seconds,
                "gb_per_s": call.nbytes / seconds / 1e9,
                "copy_gb_per_s": copy / 1e9,
                "share": least / seconds,
            }


def read(path: Path) -> dict[str, Any]:
    """Returns what an earlier run has saved.

    Raises:
        OSError: it cannot be read.
        ValueError: it is of another format.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path}: expected what `bench --json` has written, of format {FORMAT}")
    return found


def show(rows: Sequence[dict[str, Any]], before: dict[str, Any] | None) -> None:
    """Prints the table, with ratios to an earlier run."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("kernel", no_wrap=True)
    for heading in ("elements", "us", "GB/s", "copy", "of roofline"):
        table.add_column(heading, justify="right")
    known = {}
    if before is not None:
        table.add_column("us / other", justify="right")
        known = {(r["kernel"], r["elements"]): r["seconds"] for r in before["rows"]}
    for r in rows:
        cells = [r["kernel"], f"2^{r['elements'].bit_length() - 1}", f"{1e6 * r['seconds']:.1f}"]
        cells += [f"{r['gb_per_s']:.1f}", f"{r['copy_gb_per_s']:.1f}", f"{r['share']:.0%}"]
        if before is not None:
            other = known.get((r["kernel"], r["elements"]))
            cells.append("" if other is None else f"{r['seconds'] / other:.2f}")
        table.add_row(*cells)
    Console().print(table)


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draws the share of the roofline by size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for kernel in dict.fromkeys(r["kernel"] for r in rows):
        own = [r for r in rows if r["kernel"] == kernel]
        axes.plot([r["elements"] for r in own], [r["share"] for r in own], ".-", label=kernel)
    axes.axhline(1, color="gray", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("elements of the main gradient")
    axes.set_ylabel("share of the roofline")
    axes.set_title(title)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line, and what is to be compared."""
    parser = argparse.ArgumentParser(
        prog="python -m gradacc_kernels bench", description="Times each kernel on this machine."
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--backend", default="auto", choices=("auto", *dispatch.BACKENDS))
    parser.add_argument("--sizes", help="powers of two, as 18,22: elements of the main gradient")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--png", type=Path, help="picture to write")
    parser.add_argument("--compare", type=Path, help="a file of --json")
    options = parser.parse_args(arguments)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        options.device = torch.device(options.device or default)
        text = options.sizes or ",".join(map(str, SIZES[options.device.type]))
        options.sizes = [int(size) for size in text.split(",")]
        if not all(1 <= size <= 31 for size in options.sizes):
            raise ValueError(f"--sizes: expected powers of two from 1 to 31, got {text}")
        options.backend = dispatch.choose(options.device, torch.float32, options.backend)
        options.compare = None if options.compare is None else read(options.compare)
        import rich  # noqa: F401

        if options.png is not None:
            import matplotlib  # noqa: F401
    except ImportError as error:
        parser.error(f"bench needs rich, and --png matplotlib ({error}): pip install them")
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str]) -> int:
    """Times, prints and writes; returns the exit status."""
    options = parse(arguments)
    from rich.progress import Progress

    is_of = environment(options.device) | {"backend": options.backend}
    title = f"{is_of['device']}, backend {options.backend}, torch {is_of['torch']}"
    print(title)
    if options.compare is not None:
        print(
            f"other: {options.compare['environment']['device']}, "
            f"backend {options.compare['environment']['backend']}"
        )
    rows = []
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("kernels", total=9 * len(options.sizes))
        for row in measure(options.device, options.backend, options.sizes):
            rows.append(row)
            progress.update(task, advance=1, description=row["kernel"])
    show(rows, options.compare)
    if options.json is not None:
        saved = {"format": FORMAT, "environment": is_of, "rows": rows}
        options.json.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    if options.png is not None:
        draw(rows, title, options.png)
    return 0
