"""Rows of results: progress while they are measured, a text table, a JSON file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from timing import Timing

T = TypeVar("T")


def tracked(items: Sequence[T], description: str) -> Iterator[T]:
    """Yields the items: under a progress bar on a terminal, else after a line of text."""
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import track
        except ImportError:
            pass
        else:
            console = Console(stderr=True)
            yield from track(items, f"{description:<20}", console=console)
            return
    print(f"{description}: {len(items)} measurements", file=sys.stderr, flush=True)
    yield from items


def row(timing: Timing, *, bytes: int, **labels) -> dict:
    """Returns one result: its labels, the declared bytes of one call, times and GB/s."""
    return {
        **labels,
        "bytes": bytes,
        "timer": timing.timer,
        "p20_us": round(timing.p20, 3),
        "p50_us": round(timing.p50, 3),
        "p80_us": round(timing.p80, 3),
        "host_us": None if timing.host is None else round(timing.host, 3),
        "gb_per_s": round(bytes / timing.p50 / 1e3, 2),
    }


def add_share_of_copy(rows: Sequence[dict], copy_gb_per_s: float) -> None:
    """Writes into each row its GB/s over those of a copy that was measured in the same run."""
    for result in rows:
        result["share_of_copy"] = round(result["gb_per_s"] / copy_gb_per_s, 4)


def save(path: Path, environment: dict, rows: Sequence[dict]) -> None:
    """Writes a results file: the environment, and one line a row."""
    lines = ",\n".join(f"    {json.dumps(result)}" for result in rows)
    head = json.dumps(environment, indent=2).replace("\n", "\n  ")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n  "environment": {head},\n  "rows": [\n{lines}\n  ]\n}}\n')


_COLUMNS = {
    "case": lambda r: r["case"],
    "dtype": lambda r: r["dtype"],
    "what": lambda r: r["name"],
    "backend": lambda r: r["backend"],
    "timer": lambda r: r["timer"],
    "p20 us": lambda r: f"{r['p20_us']:.1f}",
    "p50 us": lambda r: f"{r['p50_us']:.1f}",
    "p80 us": lambda r: f"{r['p80_us']:.1f}",
    "GB/s": lambda r: f"{r['gb_per_s']:.1f}",
    "of copy": lambda r: f"{r['share_of_copy']:.2f}",
    "launch us": lambda r: "" if r["host_us"] is None else f"{r['host_us']:.1f}",
}


def table(rows: Sequence[dict]) -> str:
    """Returns an aligned text table: text on the left, numbers on the right."""
    cells = [list(_COLUMNS), *([text(result) for text in _COLUMNS.values()] for result in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    first_number = list(_COLUMNS).index("p20 us")
    lines = []
    for line in cells:
        padded = (
            cell.ljust(width) if i < first_number else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
