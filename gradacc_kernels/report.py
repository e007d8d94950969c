"""``python -m gradacc_kernels report run.jsonl``: a page of HTML about a run, which opens offline.

The file is what ``gk.JsonLines`` has written for a ``gk.Monitor``: one JSON object a window. A line
that was cut off at the end, as by a run that was killed, is left out. What is drawn, against the
number of the window:

    norm of the gradient, and the largest norms of parameters; loss scale; micro-batches and tokens
    of a window (the effective batch); windows and micro-batches that were skipped; memory; seconds
    of a window; the noise scale and all other numbers that ``Monitor.log`` has added

Windows with inf or NaN are marked, and listed with the parameters that had one.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradacc_kernels.accumulator import human

# Panels: a title, keys, and whether the axis is logarithmic.
PANELS = (
    ("gradient norm", ("norm",), True),
    ("loss scale", ("loss_scale",), True),
    ("tokens of a window", ("tokens",), False),
    ("micro-batches of a window", ("micro_batches",), False),
    ("skipped so far", ("skipped_windows", "skipped_micro_batches"), False),
    ("memory, GB", ("nbytes", "cuda_bytes", "cuda_peak_bytes"), False),
    ("seconds of a window", ("seconds",), False),
)
NOT_DRAWN = {"step", "time", "largest", "found_inf", "nonfinite"}
MOST_LISTED = 20
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c1e21; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(21rem, 1fr)); gap: 1rem; }
.panels figure { margin: 0; border: 1px solid #ddd; border-radius: 6px; padding: .5rem; }
.panels svg { width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: left; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr { border-bottom: 1px solid #eee; } .bad { color: #b3261e; }
"""


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no record, or a line that is none, but for one that was cut off: the
            last, or one that a resumed run went on after.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "step" not in record:
                raise ValueError("no record of gk.Monitor")
        except ValueError as error:
            is_json = not isinstance(error, json.JSONDecodeError)
            if number == len(lines) or (not is_json and lines[number].startswith('{"step":')):
                continue
            raise ValueError(f"{path}, line {number}: {error}") from error
        records.append(record)
    if not records:
        raise ValueError(f"{path} holds no record: expected what gk.JsonLines has written")
    return records


def page(records: Sequence[dict[str, Any]], title: str) -> str:
    """Returns the page: HTML with its style and its pictures inside."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        _summary(records),
        "<h2>Windows</h2><div class=panels>",
        *(f"<figure>{picture}</figure>" for picture in _pictures(records)),
        "</div>",
        _overflows(records),
        _largest(records[-1]),
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _summary(records: Sequence[dict[str, Any]]) -> str:
    first, last = records[0], records[-1]
    tokens = [r["tokens"] for r in records if r.get("tokens") is not None]
    rows = [
        ("windows", f"{len(records):,}, numbers {first['step']:,} to {last['step']:,}"),
        ("time", f"{last['time'] - first['time']:,.0f} s from the first to the last"),
        ("micro-batches", f"{sum(r['micro_batches'] for r in records):,}"),
        ("skipped windows", f"{last['skipped_windows']:,}"),
        ("skipped micro-batches", f"{last['skipped_micro_batches']:,}"),
        ("windows with inf or NaN", f"{sum(bool(r['found_inf']) for r in records):,}"),
        ("last norm", _number(last["norm"])),
        ("last loss scale", f"{last['loss_scale']:,.0f}"),
        ("main gradients", human(last["nbytes"])),
    ]
    if tokens:
        rows.insert(3, ("tokens", f"{sum(tokens):,.0f}"))
    if last.get("cuda_peak_bytes"):
        rows.append(("most memory of the GPUs", human(last["cuda_peak_bytes"])))
    return _table([], rows)


def _overflows(records: Sequence[dict[str, Any]]) -> str:
    """Why windows were skipped: which parameters had an inf or NaN, and when first."""
    bad = [r for r in records if r["found_inf"]]
    if not bad:
        return "<h2>Overflows</h2><p>No window had inf or NaN.</p>"
    counts = Counter(name for r in bad for name in r["nonfinite"])
    rows = [(name, f"{count:,}") for name, count in counts.most_common(MOST_LISTED)]
    windows = [
        (f"{r['step']:,}", f"{r['loss_scale']:,.0f}", _names(r["nonfinite"]))
        for r in bad[:MOST_LISTED]
    ]
    shown = f", the first {MOST_LISTED}" if len(bad) > MOST_LISTED else ""
    return (
        f"<h2 class=bad>Overflows: {len(bad):,} windows{shown}</h2>"
        + _table(["window", "loss scale", "parameters with inf or NaN"], windows)
        + "<h2>Parameters that had inf or NaN most often</h2>"
        + _table(["parameter", "windows"], rows)
    )


def _largest(record: dict[str, Any]) -> str:
    rows = [(name, _number(norm)) for name, norm in (record.get("largest") or {}).items()]
    heading = f"<h2>Largest gradients of the last window, {record['step']:,}</h2>"
    return heading + _table(["parameter", "norm"], rows)


def _names(names: Sequence[str]) -> str:
    """The last ones, which are the nearest to the loss, as a rule."""
    before = f"{len(names) - 4} others and " if len(names) > 4 else ""
    return before + ", ".join(names[-4:])


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:,.5g}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    head = [line("th", heads)] if heads else []
    return f"<table>{''.join([*head, *(line('td', row) for row in rows)])}</table>"


def _pictures(records: Sequence[dict[str, Any]]) -> list[str]:
    """The panels as SVG; a series that no window has is left out."""
    known = NOT_DRAWN.union(*(keys for _, keys, _ in PANELS))
    others = [key for key in dict.fromkeys(k for r in records for k in r) if key not in known]
    panels = []
    for title, keys, is_log in (*PANELS, *((key, (key,), False) for key in others)):
        scale = 1e-9 if title.startswith("memory") else 1.0
        series = {key: [_value(r.get(key), scale) for r in records] for key in keys}
        panels.append((title, series, is_log))
    panels.insert(1, ("largest norms of parameters", _series_of_largest(records), True))
    steps = [r["step"] for r in records]
    bad = [r["step"] for r in records if r["found_inf"]]
    drawn = [
        (title, {key: values for key, values in series.items() if _has_any(values)}, is_log)
        for title, series, is_log in panels
    ]
    return [_draw(t, steps, series, bad, is_log) for t, series, is_log in drawn if series]


def _series_of_largest(records: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    counts = Counter(name for r in records for name in r.get("largest") or {})
    names = [name for name, _ in counts.most_common(5)]
    return {n: [_value((r.get("largest") or {}).get(n)) for r in records] for n in names}


def _value(value: Any, scale: float = 1.0) -> float:
    """NaN, which draws a gap, for what is no number."""
    return scale * value if isinstance(value, (int, float)) else math.nan


def _has_any(values: Sequence[float]) -> bool:
    return any(map(math.isfinite, values))


def _draw(
    title: str,
    steps: Sequence[int],
    series: dict[str, list[float]],
    bad: Sequence[int],
    is_log: bool,
) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = figure.add_subplot()
    for step in bad:
        axes.axvline(step, color="#b3261e", alpha=0.25, linewidth=1)
    for name, values in series.items():
        axes.plot(steps, values, ".-" if len(steps) < 60 else "-", linewidth=1, label=name)
    positive = [v for values in series.values() for v in values if v > 0]
    if is_log and positive and max(positive) > 4 * min(positive):
        axes.set_yscale("log")
    elif not any(v < 0 for values in series.values() for v in values):
        axes.set_ylim(bottom=0)
    if len(series) > 1:
        axes.legend(fontsize=7)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("window", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def main(arguments: Sequence[str]) -> int:
    """Writes the page; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m gradacc_kernels report", description="Writes a page of HTML about a run."
    )
    parser.add_argument("records", type=Path, help="what gk.JsonLines has written")
    parser.add_argument("-o", "--out", type=Path, help="default: beside it, as .html")
    options = parser.parse_args(arguments)
    out = options.out or options.records.with_suffix(".html")
    if out == options.records:
        parser.error(f"{out} is the file of the records: choose another by --out")
    try:
        records = read(options.records)
        out.write_text(page(records, options.records.stem), encoding="utf-8")
    except ImportError as error:
        parser.error(f"the pictures need matplotlib ({error}): pip install matplotlib")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {out}: {len(records)} windows")
    return 0
