"""Rows of results: progress while they are measured, a text table, a JSON file."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import targets
import torch
from timing import Timing

T = TypeVar("T")

_start = time.perf_counter()


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


def device(parser: argparse.ArgumentParser, asked_for: str | None) -> str:
    """Returns the device to run on; ends the command with an error where it is not there."""
    is_there = torch.cuda.is_available()
    if asked_for == "cuda" and not is_there:
        parser.error("--device cuda: torch sees no GPU")
    return asked_for or ("cuda" if is_there else "cpu")


def say(text: str) -> None:
    """Prints a line of progress, with the seconds since the start."""
    print(f"[{time.perf_counter() - _start:6.1f} s] {text}", file=sys.stderr, flush=True)


@contextmanager
def survived(what: str, failures: list[str]) -> Iterator[None]:
    """Lets a run go on when one measurement of it fails; notes it, and prints the traceback.

    A way that is wrong or runs out of memory has no row; the run exits with an error at its end.
    """
    try:
        yield
    except Exception as error:
        failures.append(f"{what}: {type(error).__name__}: {error}")
        traceback.print_exc()
        sys.stderr.flush()


def end(failures: Sequence[str]) -> None:
    """Exits with an error that lists the measurements that failed, if any did."""
    if failures:
        sys.exit("\n".join(["failed:", *failures]))


def times(timing: Timing) -> dict:
    """Returns the part of a row that a timing gives."""
    return {
        "timer": timing.timer,
        "p20_us": round(timing.p20, 3),
        "p50_us": round(timing.p50, 3),
        "p80_us": round(timing.p80, 3),
        "host_us": None if timing.host is None else round(timing.host, 3),
    }


def row(timing: Timing, *, bytes: int, **labels) -> dict:
    """Returns one result: its labels, the declared bytes of one call, times and GB/s."""
    return {
        **labels,
        "bytes": bytes,
        **times(timing),
        "gb_per_s": round(bytes / timing.p50 / 1e3, 2),
    }


def add_share_of_copy(rows: Sequence[dict], copy_gb_per_s: float) -> None:
    """Writes into each row its GB/s over those of a copy that was measured in the same run."""
    for result in rows:
        result["share_of_copy"] = round(result["gb_per_s"] / copy_gb_per_s, 4)


def save(path: Path, environment: dict, rows: Sequence[dict], **more) -> None:
    """Writes a results file: the environment, more entries if given, and one line a row."""

    def indented(value) -> str:
        return json.dumps(value, indent=2).replace("\n", "\n  ")

    def lines(rows: Sequence[dict]) -> str:
        return "[\n" + ",\n".join(f"    {json.dumps(result)}" for result in rows) + "\n  ]"

    entries = {"environment": indented(environment)}
    for name, value in more.items():
        entries[name] = lines(value) if isinstance(value, list) else indented(value)
    entries["rows"] = lines(rows)
    text = ",\n".join(f'  "{name}": {value}' for name, value in entries.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{{\n{text}\n}}\n")


def finish_against_copy(
    rows: Sequence[dict],
    copy_gb_per_s: float,
    targets_of: Callable[[Sequence[dict]], list[dict]],
    environment: dict,
    path: Path | None,
    failures: Sequence[str],
) -> None:
    """Ends a run of elementwise kernels: shares of the copy, targets, results file and tables."""
    add_share_of_copy(rows, copy_gb_per_s)
    found = targets_of(rows)
    if path:
        more = {"copy_gb_per_s": round(copy_gb_per_s, 2), "targets": found}
        save(path, environment, rows, **more)
    print(table(rows, CACHE_COLUMNS, n_text=6))
    print(f"\n{targets.table(found)}")
    end(failures)


Columns = Mapping[str, Callable[[dict], str]]

BANDWIDTH_COLUMNS: Columns = {
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

CACHE_COLUMNS: Columns = {
    "case": BANDWIDTH_COLUMNS["case"],
    "cache": lambda r: r["cache"],
    **BANDWIDTH_COLUMNS,
}


def table(rows: Sequence[dict], columns: Columns = BANDWIDTH_COLUMNS, *, n_text: int = 5) -> str:
    """Returns an aligned text table: the first ``n_text`` columns on the left, numbers right."""
    cells = [list(columns), *([text(result) for text in columns.values()] for result in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = (
            cell.ljust(width) if i < n_text else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
