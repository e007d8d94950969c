"""Writes what the benchmarks found into the documents: tables, and a picture.

    python benchmarks/render.py            rewrite the blocks in README.md and docs/*.md, and
                                           docs/accumulate.png
    python benchmarks/render.py --check    write nothing; exit 1 when something would change

A block stands between ``<!-- generated: NAME -->`` and ``<!-- end generated -->``. NAME is

    accumulate DEVICE         one compact table of benchmarks/results/accumulate_DEVICE.json
    accumulate DEVICE full    every row of it
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "accumulate.png"
BLOCK = re.compile(r"(<!-- generated: (.*?) -->\n)(.*?)(<!-- end generated -->)", re.DOTALL)


class RenderError(Exception):
    """A document or a results file that cannot be rendered; the message says which and why."""


def load(stem: str) -> dict:
    """Returns a results file."""
    path = RESULTS / f"{stem}.json"
    if not path.is_file():
        raise RenderError(f"there is no {path.relative_to(ROOT)}")
    return json.loads(path.read_text())


def three_digits(value: float) -> str:
    """Returns a number below 1000 with three digits, 12.0 and not 12."""
    return f"{value:#.3g}".removesuffix(".")


def duration(microseconds: float) -> str:
    """Returns a time with its unit."""
    if microseconds >= 999.5:
        return f"{three_digits(microseconds / 1000)} ms"
    return f"{three_digits(microseconds)} us"


def is_graph(result: dict) -> bool:
    """Tells whether a row was timed in a CUDA graph."""
    return result["timer"].startswith("graph")


def describe(case: Sequence[dict]) -> str:
    """Returns the heading of a case."""
    first = case[0]
    if first["tensors"] == 1:
        return f"one tensor of {first['case']} elements, {first['dtype']}"
    return (
        f"{first['case']}: {first['tensors']} tensors, {first['n'] / 1e6:.3g}M elements, "
        f"{first['dtype']}"
    )


def markdown_row(result: dict, ours: dict | None, with_launch: bool) -> str:
    """Returns one line of a table, in bold for the row that the others are compared with."""
    name = result["name"].replace("_", r"\_").replace("*", r"\*")
    details = [] if result["backend"] == "torch" else [result["backend"]]
    details += ["CUDA graph"] if is_graph(result) else []
    details += ["host-bound"] if result["timer"].endswith("host-bound") else []
    cells = [
        f"{name}, {', '.join(details)}" if details else name,
        duration(result["p50_us"]),
        *([duration(result["host_us"])] if with_launch else []),
        f"{result['gb_per_s']:.4g}",
        f"{result['share_of_copy']:.2f}",
        "" if ours is None else f"{result['p50_us'] / ours['p50_us']:.2f}x",
    ]
    if result is ours:
        cells = [f"**{cell}**" for cell in cells]
    return table_line(cells)


def table_line(cells: Sequence[str]) -> str:
    """Returns one line of a table; empty cells take no space."""
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def markdown_table(cases: Sequence[Sequence[dict]], results: dict) -> str:
    """Returns one table of several cases, and under it what it was measured with."""
    backend = results["environment"]["backend"]
    with_launch = any(result["host_us"] is not None for case in cases for result in case)
    columns = ["time, p50", *(["launch, host"] if with_launch else []), "GB/s", "of copy"]
    columns.append("time / ours")
    lines = [table_line(["what", *columns]), "|---|" + "--:|" * len(columns)]
    for case in cases:
        ours = {is_graph(r): r for r in case if r["headline"] and r["backend"] == backend}
        lines.append(table_line([f"*{describe(case)}*", *len(columns) * [""]]))
        lines += [markdown_row(r, ours.get(is_graph(r)), with_launch) for r in case]
    return "\n".join(lines) + f"\n\n{provenance(results['environment'])}\n"


def provenance(environment: dict) -> str:
    """Returns the sentence that says what a table was measured with."""
    e = environment
    parts = [e["device"], f"torch {e['torch']}"]
    if e["driver"]:
        parts += [f"driver {e['driver']}", f"CUDA {e['cuda']}", f"triton {e['triton']}"]
    else:
        parts.append(f"{e['threads']} threads")
    commit = (e["commit"] or "unknown")[:7] + (" with changes" if e["dirty"] else "")
    return f"{', '.join(parts)}; gradacc_kernels {e['gradacc_kernels']}, commit {commit}."


def cases_of(results: dict) -> list[list[dict]]:
    """Returns the rows of each case; those without a 16-bit gradient stay with the first dtype."""
    cases: dict[tuple[str, str], list[dict]] = {}
    for name, group in groupby(results["rows"], key=lambda r: r["case"]):
        dtype = ""
        for result in group:
            if result["dtype"] != "fp32":
                dtype = result["dtype"]
            cases.setdefault((name, dtype), []).append(result)
    return list(cases.values())


def compact(results: dict) -> list[list[dict]]:
    """Returns the largest tensor in bf16 and every list, served by the default backend."""
    cases = cases_of(results)
    single = max((c for c in cases if is_bf16_tensor(c)), key=lambda c: c[0]["n"])
    lists = [case for case in cases if case[0]["tensors"] > 1]
    served_by = ("torch", results["environment"]["backend"])
    return [
        [r for r in case if r["backend"] in served_by and not is_graph(r)]
        for case in [single, *lists]
    ]


def is_bf16_tensor(case: Sequence[dict]) -> bool:
    """Tells whether a case is one tensor with a bf16 gradient."""
    return case[0]["tensors"] == 1 and case[0]["dtype"] == "bf16"


def accumulate_block(device: str, *options: str) -> str:
    """Returns the block ``accumulate DEVICE [full]``."""
    if options not in ((), ("full",)):
        raise RenderError(f"accumulate DEVICE may be followed by full, got {' '.join(options)}")
    results = load(f"accumulate_{device}")
    return markdown_table(cases_of(results) if options else compact(results), results)


BLOCKS = {"accumulate": accumulate_block}


def render_document(path: Path) -> str:
    """Returns a document's text with its blocks rewritten."""
    text = path.read_text()

    def rewrite(match: re.Match) -> str:
        begin, name, _, end = match.groups()
        kind, *arguments = name.split() or [""]
        if kind not in BLOCKS or not arguments:
            raise RenderError(f"{path.name}: no generated block is called {name!r}")
        try:
            return begin + BLOCKS[kind](*arguments) + end
        except RenderError as error:
            raise RenderError(f"{path.name}: block {name!r}: {error}") from None

    rewritten, count = BLOCK.subn(rewrite, text)
    if count != text.count("<!-- generated:") or count != text.count("<!-- end generated -->"):
        raise RenderError(f"{path.name}: a generated block without its begin or its end")
    return rewritten


def picture_data() -> dict | None:
    """Returns what the picture shows: the largest bf16 tensor of all results files."""
    found = []
    for path in sorted(RESULTS.glob("accumulate_*.json")):
        results = json.loads(path.read_text())
        found.append((compact(results)[0], results["environment"]["device"]))
    if not found:
        return None
    case, device = max(found, key=lambda entry: entry[0][0]["n"])
    ours = next(r for r in case if r["headline"])
    copy_gb_per_s = ours["gb_per_s"] / ours["share_of_copy"]
    return {
        "title": f"{describe(case)}, {device}",
        "bars": [
            [r["name"], r["p50_us"] / 1e3, r["backend"] != "torch"]
            for r in sorted(case, key=lambda r: r["p50_us"])
        ],
        "floor_ms": ours["bytes"] / copy_gb_per_s / 1e6,
    }


def draw(data: dict, metadata: dict) -> None:
    """Draws the time of each way as a bar, and the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, times, are_ours = zip(*data["bars"], strict=True)
    figure, axes = pyplot.subplots(figsize=(9, 0.36 * len(names) + 1.1), layout="constrained")
    bars = axes.barh(names, times, color=["#1f6fb4" if own else "#b8bec4" for own in are_ours])
    axes.axvline(data["floor_ms"], color="black", linewidth=1, linestyle="--")
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(bars, [three_digits(time) for time in times], padding=4, bbox=behind)
    axes.annotate(
        f"10 B per element at copy speed: {three_digits(data['floor_ms'])} ms",
        xy=(data["floor_ms"], -0.55),
        xytext=(6, 0),
        textcoords="offset points",
        va="bottom",
    )
    axes.set_ylim(len(names) - 0.4, -1.2)
    axes.set_xlim(0, 1.1 * max(times))
    axes.set_xlabel("ms")
    axes.set_title(data["title"], loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150, metadata=metadata)
    pyplot.close(figure)


def render_picture(is_check: bool) -> bool:
    """Redraws the picture where its data or the way it is drawn changed; returns whether it was.

    The file carries a digest of both, since other versions of matplotlib give other pixels.
    """
    data = picture_data()
    if data is None:
        return False
    drawn_from = json.dumps(data) + inspect.getsource(draw)
    digest = f"sha256 {hashlib.sha256(drawn_from.encode()).hexdigest()}"
    if PICTURE.is_file() and digest.encode() in PICTURE.read_bytes():
        return False
    if not is_check:
        draw(data, {"Source": digest})
    return True


def render(is_check: bool) -> list[Path]:
    """Renders all; returns the files that changed, or would."""
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    rendered = {path: render_document(path) for path in documents if path.is_file()}
    changed = [path for path, text in rendered.items() if text != path.read_text()]
    if not is_check:
        for path in changed:
            path.write_text(rendered[path])
    return changed + ([PICTURE] if render_picture(is_check) else [])


def main() -> None:
    """Renders, or checks that rendering changes nothing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    options = parser.parse_args()
    try:
        changed = render(options.check)
    except RenderError as error:
        sys.exit(f"render.py: {error}")
    for path in changed:
        verb = "is out of date" if options.check else "was rewritten"
        print(f"{path.relative_to(ROOT)} {verb}")
    if options.check and changed:
        sys.exit("run: python benchmarks/render.py")


if __name__ == "__main__":
    main()
