"""Writes what the benchmarks found into the documents: tables, and pictures.

    python benchmarks/render.py            rewrite the blocks in README.md and docs/*.md, and the
                                           pictures docs/accumulate.png, sizes.png, roofline.png
                                           and training.png, as far as there are results for them
    python benchmarks/render.py --check    write nothing; exit 1 when something would change

A block stands between ``<!-- generated: NAME -->`` and ``<!-- end generated -->``. NAME is

    accumulate DEVICE         one compact table of benchmarks/results/accumulate_DEVICE.json
    accumulate DEVICE full    every row of it
    multi_tensor DEVICE       lists of tensors, served by the default backend: multi_tensor_DEVICE
    multi_tensor DEVICE full  every row of it
    targets BENCHMARK DEVICE  the targets of BENCHMARK_DEVICE.json, met or not
    training DEVICE           GPU time of a micro-batch: training_DEVICE.json
    accuracy DEVICE           the gradients' errors: training_DEVICE.json
    eager DEVICE              wall-clock time and peak memory: eager_DEVICE.json
    wgrad DEVICE              weight-gradient GEMMs at three lengths: wgrad_DEVICE.json
    wgrad DEVICE full         at all lengths, with statistics slots and Triton's kernel
    embedding DEVICE          the embedding's part of wgrad_DEVICE.json
    close DEVICE              closing a window: close_DEVICE.json
    memory DEVICE             bytes a parameter: memory_DEVICE.json, and memory_peers.py
    hook DEVICE               host time of a gradient's hook: hook_DEVICE.json
    queue DEVICE              adding at once or waiting for a common launch: queue_DEVICE.json
    counters DEVICE           what bounds the elementwise kernels: counters_DEVICE.json
    master_params DEVICE      losses with float32 masters: master_params_DEVICE.json
    monitor DEVICE            what it costs to look: monitor_DEVICE.json
    loops DEVICE              loops of libraries, with their integrations or not: loops_DEVICE.json
    ranks DEVICE              windows on several GPUs: ranks_DEVICE.json
    ranks DEVICE buckets      the sizes of buckets
    ranks DEVICE blocks       what of a reduction is not hidden
    ranks DEVICE costs        a collective by its size, and the passes of a micro-batch
    ranks DEVICE model        what more ranks would cost: model_ranks.py, fed with that file

A block of ranks says that it was not measured where there is no such file.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import model_ranks
from memory_peers import PEERS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CHAIN = "main.add_(grad) + unscale, check + norm"
COMPACT_TOKENS = (256, 1024, 4096)
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
    if microseconds >= 999.5e3:
        return f"{three_digits(microseconds / 1e6)} s"
    if microseconds >= 999.5:
        return f"{three_digits(microseconds / 1000)} ms"
    return f"{three_digits(microseconds)} us"


def is_graph(result: dict) -> bool:
    """Tells whether a row was timed in a CUDA graph."""
    return result["timer"].startswith("graph")


def timer_of(result: dict) -> str:
    """Returns what a row was timed with: events, graph or wall."""
    return result["timer"].split(",")[0]


def is_cold(result: dict) -> bool:
    """Tells whether a row was timed with cold caches, as all are in files without warm ones."""
    return result.get("cache", "cold") == "cold"


def describe(case: Sequence[dict]) -> str:
    """Returns the heading of a case."""
    first = case[0]
    if first["tensors"] == 1:
        return f"one tensor of {first['case']} elements, {first['dtype']}"
    return (
        f"{first['case']}: {first['tensors']} tensors, {first['n'] / 1e6:.3g}M elements, "
        f"{first['dtype']}"
    )


def markdown_row(result: dict, ours: dict | None, with_launch: bool, warm: Sequence[str]) -> str:
    """Returns one line of a table, in bold for the row that the others are compared with."""
    name = result["name"].replace("_", r"\_").replace("*", r"\*")
    details = [] if result["backend"] == "torch" else [result["backend"]]
    details += ["CUDA graph"] if is_graph(result) else []
    details += ["wall"] if timer_of(result) == "wall" and with_launch else []
    details += ["host-bound"] if result["timer"].endswith("host-bound") else []
    cells = [
        f"{name}, {', '.join(details)}" if details else name,
        duration(result["p50_us"]),
        *([duration(result["host_us"])] if with_launch else []),
        f"{result['gb_per_s']:.4g}",
        f"{result['share_of_copy']:.2f}",
        "" if ours is None else f"{result['p50_us'] / ours['p50_us']:.2f}x",
        *warm,
    ]
    if result is ours:
        cells = bold(cells)
    return table_line(cells)


def table_line(cells: Sequence[str]) -> str:
    """Returns one line of a table; empty cells take no space."""
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def markdown_table(cases: Sequence[Sequence[dict]], results: dict) -> str:
    """Returns one table of several cases, and under it what it was measured with.

    A way's time with a warm gradient is a column of its last line.
    """
    backend = results["environment"]["backend"]
    with_launch = any(result["host_us"] is not None for case in cases for result in case)
    with_warm = any(not is_cold(result) for case in cases for result in case)
    columns = ["time, p50", *(["launch, host"] if with_launch else []), "GB/s", "of copy"]
    columns += ["time / ours", *(["warm gradient"] if with_warm else [])]
    lines = [table_line(["what", *columns]), "|---|" + "--:|" * len(columns)]
    for case in cases:
        cold = [r for r in case if is_cold(r)]
        ours = {timer_of(r): r for r in cold if r["headline"] and r["backend"] == backend}
        last = {way_of(r): r for r in cold}
        warm = {way_of(r): duration(r["p50_us"]) for r in case if not is_cold(r)}
        lines.append(table_line([f"*{describe(case)}*", *len(columns) * [""]]))
        for r in cold:
            cell = warm.get(way_of(r), "") if r is last[way_of(r)] else ""
            more = [cell] if with_warm else []
            lines.append(markdown_row(r, ours.get(timer_of(r)), with_launch, more))
    return "\n".join(lines) + f"\n\n{provenance(results['environment'])}\n"


def way_of(result: dict) -> tuple[str, str]:
    """Returns what tells a way from the others of its case."""
    return result["name"], result["backend"]


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
    """Returns a large tensor in bf16 and every list, served by the default backend."""
    cases = cases_of(results)
    single = max((c for c in cases if is_bf16_tensor(c)), key=largeness)
    lists = [case for case in cases if case[0]["tensors"] > 1]
    return [by_default_backend(case, results) for case in [single, *lists]]


def largeness(case: Sequence[dict]) -> int:
    """Returns what compares cases: elements, but first those of which all ways were timed."""
    n = case[0]["n"]
    return n if n <= 1 << 28 else -n


def by_default_backend(case: Sequence[dict], results: dict) -> list[dict]:
    """Returns a case's cold rows of torch and of the default backend, without graphs."""
    served_by = ("torch", results["environment"]["backend"])
    return [r for r in case if r["backend"] in served_by and not is_graph(r) and is_cold(r)]


def is_bf16_tensor(case: Sequence[dict]) -> bool:
    """Tells whether a case is one tensor with a bf16 gradient."""
    return case[0]["tensors"] == 1 and case[0]["dtype"] == "bf16"


def accumulate_block(device: str, *options: str) -> str:
    """Returns the block ``accumulate DEVICE [full]``."""
    is_full = only_option(options, "accumulate")
    results = load(f"accumulate_{device}")
    return markdown_table(cases_of(results) if is_full else compact(results), results)


def multi_tensor_block(device: str, *options: str) -> str:
    """Returns the block ``multi_tensor DEVICE [full]``."""
    is_full = only_option(options, "multi_tensor")
    results = load(f"multi_tensor_{device}")
    cases = cases_of(results)
    if not is_full:
        cases = [by_default_backend(case, results) for case in cases]
    return markdown_table(cases, results)


def targets_block(benchmark: str, device: str) -> str:
    """Returns the block ``targets BENCHMARK DEVICE``."""
    results = load(f"{benchmark}_{device}")
    verdicts = {True: "met", False: "**missed**", None: "not measured"}
    lines = []
    for t in results["targets"]:
        measured = "" if t["measured"] is None else f"{t['measured']:.4g}"
        lines.append([escape(t["name"]), escape(t["target"]), measured, verdicts[t["met"]]])
    return table(["cold", "target", "measured", "verdict"], lines, results)


def bold(cells: Sequence[str]) -> list[str]:
    """Returns cells in bold, empty ones as they are."""
    return [f"**{cell}**" if cell else "" for cell in cells]


def escape(text: str) -> str:
    """Returns text that Markdown shows as it is."""
    return text.replace("_", r"\_").replace("*", r"\*")


def table(columns: Sequence[str], lines: Sequence[Sequence[str]], results: dict) -> str:
    """Returns a table of lines of cells, and under it what it was measured with."""
    head = [table_line(columns), "|---|" + "--:|" * (len(columns) - 1)]
    body = [table_line(line) for line in lines]
    return "\n".join(head + body) + f"\n\n{provenance(results['environment'])}\n"


def quotient(one: dict | None, other: dict | None) -> str:
    """Returns how many times one row's time is another's, or nothing where either lacks."""
    return "" if one is None or other is None else f"{one['p50_us'] / other['p50_us']:.2f}"


def time_of(result: dict | None) -> str:
    """Returns a row's median time."""
    return "" if result is None else duration(result["p50_us"])


def only_option(options: Sequence[str], block: str) -> bool:
    """Tells whether the option full was given; refuses others."""
    if options not in ((), ("full",)):
        raise RenderError(f"{block} DEVICE may be followed by full, got {' '.join(options)}")
    return bool(options)


TRAINING_CASES = {
    ("bf16", 1): "bfloat16 parameters, a micro-batch that adds",
    ("autocast", 8): "float32 parameters under autocast, a window of 8 from zero\\_grad on, "
    "divided by 8",
}


def training_case(results: dict, family: str, window: int) -> dict[str, dict[int, dict]]:
    """Returns the rows of a case by role, or by name for peers, and by tokens."""
    found: dict[str, dict[int, dict]] = {}
    for result in sorted(results["rows"], key=in_order):
        if (result["family"], result["window"]) == (family, window):
            key = result["name"] if result["role"] == "peer" else result["role"]
            found.setdefault(key, {})[result["tokens"]] = result
    return found


def training_lines(case: dict[str, dict[int, dict]], lengths: Sequence[int]) -> list[list[str]]:
    """Returns the lines of a case: one a way, then ratios."""
    lines = []
    for key, by_length in case.items():
        name = escape(next(iter(by_length.values()))["name"])
        line = [name, *(time_of(by_length.get(t)) for t in lengths)]
        lines.append(bold(line) if key == "ours" else line)
    ours = case.get("ours", {})
    for role, title in (("stock", "attach / PyTorch"), ("floor", "attach / thrown away")):
        other = case.get(role, {})
        ratios = [quotient(ours.get(t), other.get(t)) for t in lengths]
        if any(ratios):
            lines.append([title, *ratios])
    return lines


def training_block(device: str) -> str:
    """Returns the block ``training DEVICE``."""
    results = load(f"training_{device}")
    lengths = sorted({r["tokens"] for r in results["rows"]})
    lines = []
    for (family, window), title in TRAINING_CASES.items():
        case = training_case(results, family, window)
        if case:
            lines.append([f"*{title}*", *len(lengths) * [""]])
            lines += training_lines(case, lengths)
    return table(["GPU time of a micro-batch", *(f"T={t}" for t in lengths)], lines, results)


def accuracy_block(device: str) -> str:
    """Returns the block ``accuracy DEVICE``."""
    results = load(f"training_{device}")
    lines = []
    for family, title in (
        ("bf16", "bfloat16 parameters"),
        ("autocast", "float32 parameters under autocast"),
    ):
        rows = [r for r in results["accuracy"] if r["family"] == family]
        lines += [[f"*{title}*", ""]] if rows else []
        for r in sorted(rows, key=in_order):
            line = [escape(r["name"]), f"{r['error']:.3e}"]
            lines.append(bold(line) if r["role"] == "ours" else line)
    columns = ["two layers, a window of 8", "relative L2 error of the gradient against float64"]
    return table(columns, lines, results)


def in_order(result: dict) -> int:
    """Returns a row's place in a table: floor, PyTorch, peers, ours."""
    return ["floor", "stock", "peer", "hook", "ours"].index(result["role"])


def eager_block(device: str) -> str:
    """Returns the block ``eager DEVICE``."""
    results = load(f"eager_{device}")
    cases: dict[tuple, dict[str, dict]] = {}
    for r in results["rows"]:
        cases.setdefault((r["model"], r["family"], r["tokens"]), {})[r["role"]] = r

    def gigabytes(result: dict | None) -> str:
        return f"{result['peak_bytes'] / 1e9:.2f}" if result and result["peak_bytes"] else ""

    def megabytes_more(one: dict | None, other: dict | None) -> str:
        if not one or not other or not one["peak_bytes"]:
            return ""
        return f"{(one['peak_bytes'] - other['peak_bytes']) / 1e6:+.0f}"

    lines = []
    for (model, family, tokens), case in cases.items():
        stock, hook, ours = (case.get(role) for role in ("stock", "hook", "ours"))
        lines.append(
            [
                f"{model}, {family}, {tokens} tokens",
                *(time_of(result) for result in (stock, hook, ours)),
                *bold([f"{ours['over_stock']:.3f}" if ours and "over_stock" in ours else ""]),
                "" if ours is None else f"{ours['host_us'] / ours['p50_us']:.0%}",
                *(f"{result['error']:.2e}" if result else "" for result in (stock, ours)),
                gigabytes(stock),
                *bold([megabytes_more(ours, stock)]),
            ]
        )
    columns = ["wall clock of a micro-batch", "PyTorch", "fuse=False", "attach"]
    columns += ["attach / PyTorch", "host", "error, PyTorch", "attach"]
    columns += ["peak GB, PyTorch", "attach, MB more"]
    return table(columns, lines, results)


def wgrad_cases(results: dict, is_embedding: bool) -> list[list[dict]]:
    """Returns the rows of each case, length and dtype of the GEMMs, or of the embedding."""
    cases: dict[tuple, list[dict]] = {}
    for r in results["rows"]:
        if r["case"].startswith("embedding") == is_embedding:
            cases.setdefault((r["case"], r["tokens"], r["dtype"]), []).append(r)
    return list(cases.values())


def picker(case: Sequence[dict], results: dict) -> Callable[..., dict | None]:
    """Returns a function that finds a row of a case, of the default backend unless told."""
    by_way = {(r["name"], r["backend"], r["kind"], r["partials"]): r for r in case}
    default = results["environment"]["backend"]

    def pick(name: str, kind: str, partials: bool = False, backend: str = default) -> dict | None:
        return by_way.get((name, backend, kind, partials))

    return pick


def over_floor(result: dict | None) -> str:
    """Returns a row's time over its floor."""
    return "" if result is None else f"{result['over_floor']:.2f}"


def case_name(case: Sequence[dict]) -> str:
    """Returns what stands before a line of GEMMs or embeddings."""
    first = case[0]
    dtype = "" if first["dtype"] == "bf16" else f", {first['dtype']}"
    return f"{first['case'].removeprefix('embedding ')}, T={first['tokens']}{dtype}"


def wgrad_block(device: str, *options: str) -> str:
    """Returns the block ``wgrad DEVICE [full]``."""
    is_full = only_option(options, "wgrad")
    results = load(f"wgrad_{device}")
    name = "wgrad_accumulate_"
    columns = ["main gradient", "add", "/ floor", "addmm", "addmm / add", "store", "/ floor"]
    columns += ["mm, 16-bit out", "store / mm"]
    if is_full:
        columns += ["add, inv\\_scale", "store, inv\\_scale"]
        columns += ["add + slots", "store + slots", "add, triton", "store, triton", "mm, fp32 out"]
        columns += ["mm + accumulate\\_"]
    lines = []
    for case in wgrad_cases(results, is_embedding=False):
        if not is_full and (case[0]["tokens"] not in COMPACT_TOKENS or case[0]["dtype"] != "bf16"):
            continue
        pick = picker(case, results)
        add, store = pick(name, "add"), pick(name, "store")
        addmm = pick("addmm, beta=1", "add", backend="torch")
        mm = pick("mm, 16-bit out", "16-bit", backend="torch")
        line = [case_name(case), time_of(add), over_floor(add), time_of(addmm)]
        line += [*bold([quotient(addmm, add)]), time_of(store), over_floor(store)]
        line += [time_of(mm), *bold([quotient(store, mm)])]
        if is_full:
            others = [
                pick(f"{name}, inv_scale", "add"),
                pick(f"{name}, inv_scale", "store"),
                pick(name, "add", True),
                pick(name, "store", True),
                pick(name, "add", backend="triton"),
                pick(name, "store", backend="triton"),
                pick("mm, fp32 out", "store", backend="torch"),
                pick("mm, 16-bit out + accumulate_", "add", True),
            ]
            line += map(time_of, others)
        lines.append(line)
    return table(columns, lines, results) + rates_of(results)


def embedding_block(device: str) -> str:
    """Returns the block ``embedding DEVICE``."""
    results = load(f"wgrad_{device}")
    name = "embedding_accumulate_"
    columns = ["main gradient", "add", "/ floor", "dense backward, add\\_", "dense / add"]
    columns += ["index\\_add\\_", "index\\_add\\_ / add", "add + slots", "add, triton", "store"]
    lines = []
    for case in wgrad_cases(results, is_embedding=True):
        pick = picker(case, results)
        add = pick(name, "add")
        dense = pick("dense backward + main.add_", "add", backend="torch")
        index_add = pick("index_add_", "add", backend="torch")
        line = [case_name(case), time_of(add), over_floor(add), time_of(dense)]
        line += [*bold([quotient(dense, add)]), time_of(index_add), quotient(index_add, add)]
        others = pick(name, "add", True), pick(name, "add", backend="triton"), pick(name, "store")
        lines.append([*line, *map(time_of, others)])
    return table(columns, lines, results) + rates_of(results)


def close_block(device: str) -> str:
    """Returns the block ``close DEVICE``."""
    results = load(f"close_{device}")
    lines = []
    for r in results["rows"]:
        line = [r["way"], str(r["bytes_per_element"])]
        line += [duration(1000 * r["gpu_ms"]), duration(1000 * r["wall_ms"])]
        lines.append(bold(line) if r["way"].startswith("ours") else line)
    return table(["Llama-3.2-1B shapes", "B/element", "GPU", "wall"], lines, results)


MEMORY_FAMILIES = {
    "autocast": "float32 parameters under autocast",
    "bf16": "bfloat16 parameters",
}


def memory_block(device: str) -> str:
    """Returns the block ``memory DEVICE``: what was measured, then what peers document."""
    results = load(f"memory_{device}")
    columns = ["bytes a parameter, AdamW", "parameters", "gradients", "masters", "moments"]
    columns += ["rest", "held", "peak of a micro-batch", "of a step"]
    lines = []
    for family, title in MEMORY_FAMILIES.items():
        lines.append([f"*{title}*", *(len(columns) - 1) * [""]])
        for r in results["rows"]:
            if r["family"] == family:
                line = [escape(r["way"]), *memory_cells(r)]
                lines.append(bold(line) if r["way"].startswith("attach") else line)
    return table(columns, lines, results) + "\n" + peers_table()


def memory_cells(result: dict) -> list[str]:
    """Returns a row's bytes a parameter; statistics slots are counted with the gradients."""
    named, n = result["named_bytes"], result["elements"]
    parts = [
        named["parameters"],
        named["gradients"] + named["statistics"],
        named["masters"],
        named["optimizer_state"],
        result["rest_bytes"],
        result["held_bytes"],
        result["micro_batch_peak_bytes"],
        result["step_peak_bytes"],
    ]
    return [f"{part / n:.2f}" if part else "" for part in parts]


def peers_table() -> str:
    """Returns the table of what other libraries hold, by their documents and sources."""
    lines = [["documented, not measured", "bytes a parameter", "what is held", "source"]]
    for peer in PEERS:
        source = f"[{'stated' if peer.is_stated else 'by its code'}]({peer.source})"
        lines.append([escape(peer.name), peer.bytes_per_param, escape(peer.held), source])
    head, *body = map(table_line, lines)
    return "\n".join([head, "|---|--:|---|---|", *body]) + "\n"


WAYS_OF_MASTERS = {
    "float32": "float32",
    "float32, autocast": "float32 under autocast",
    "masters": "bfloat16, attach, MasterParams",
    "low bits": "bfloat16, attach, MasterParams(low_bits=True)",
    "masters, 16-bit sum": "bfloat16, PyTorch's .grad, MasterParams",
    "16-bit AdamW": "bfloat16, PyTorch's .grad, AdamW",
}


def master_params_block(device: str) -> str:
    """Returns the block ``master_params DEVICE``."""
    results = load(f"master_params_{device}")
    config = results["config"]
    columns = [f"{config['windows']} windows of {config['micro_batches']}"]
    columns += ["last loss", "held-out loss", "mean distance", "largest distance"]
    columns.append("held-out loss over float32's, by seed")
    lines = []
    for s in results["summary"]:
        ratios = [f"{ratio - 1:+.2%}" for ratio in s["held_out_over_reference"]]
        same = s["same_bits_as_masters"]
        name = WAYS_OF_MASTERS[s["way"]]
        if same is not None:
            name += f" ({'the same bits' if same else 'other bits'})"
        line = [escape(name), f"{s['final']:.4f}", f"{s['held_out']:.4f}"]
        if s["way"] == "float32":
            line += ["", "", ""]
        else:
            line += [f"{s['mean_apart']:.2%}", f"{s['most_apart']:.2%}", ", ".join(ratios)]
        lines.append(bold(line) if s["way"] in ("masters", "low bits") else line)
    return table(columns, lines, results)


def hook_block(device: str) -> str:
    """Returns the block ``hook DEVICE``."""
    results = load(f"hook_{device}")
    is_timed = any(r["busy_us"] is not None for r in results["rows"])
    columns = ["host, a parameter", "us", "over no hook", "backward"]
    columns += ["GPU busy", "GPU idle"] if is_timed else []
    lines = []
    for name, group in groupby(results["rows"], key=lambda r: r["case"]):
        rows = list(group)
        title = f"*{name}{arrival(rows[0]) if is_timed else ''}*"
        lines.append([title, *(len(columns) - 1) * [""]])
        lines += [hook_line(r, is_timed) for r in rows]
    text = table(columns, lines, results)
    if results["targets"]:
        text += "\n" + targets_table(results["targets"])
        text += f"\nThe launch of an empty kernel took the host {results['launch_us']:.1f} us.\n"
    return text


def arrival(result: dict) -> str:
    """Returns what the C++ hook does with a case's gradients."""
    told = {"queued": "queued", "at once": "added at once", "both": "small ones queued"}
    return f", {told[result['arrival']]}"


def hook_line(result: dict, is_timed: bool) -> list[str]:
    """Returns a way's line; what is over no hook is left out where there is none."""
    is_baseline = result["role"] == "none"
    line = [escape(result["name"]), f"{result['host_us_per_param']:.2f}"]
    line.append("" if is_baseline else f"{result['over_none_us_per_param']:.2f}")
    line.append(duration(result["wall_us"]))
    if is_timed:
        for key in ("busy_us", "idle_us"):
            line.append("" if result[key] is None else duration(result[key]))
    return bold(line) if result["role"] == "ours" else line


def targets_table(targets: Sequence[dict]) -> str:
    """Returns the table of what was aimed at."""
    lines = [table_line(["target", "at most", "measured", "met"]), "|---|--:|--:|---|"]
    for t in targets:
        name = escape(f"{t['case']}: {t['what']}")
        met = "yes" if t["met"] else "no"
        cells = [name, f"{t['target_us']:.1f}", f"{t['measured_us']:.2f}", met]
        lines.append(table_line(cells))
    return "\n".join(lines) + "\n"


QUEUE_FIGURES = {
    "gpu_us": "GPU time, in a CUDA graph",
    "wall_us": "wall clock",
    "host_us": "host, backward alone",
    "peak_bytes": "peak over the model, GB",
}


def queue_block(device: str) -> str:
    """Returns the block ``queue DEVICE``."""
    results = load(f"queue_{device}")
    cases: dict[tuple[str, str], dict[tuple[int, int], dict]] = {}
    others: dict[tuple[str, str], dict] = {}
    for r in results["rows"]:
        if r["role"] == "attach":
            cases.setdefault((r["model"], r["fuse"]), {})[r["below"], r["bytes"]] = r
        else:
            others[r["model"], r["role"]] = r
    points = list(dict.fromkeys(point for case in cases.values() for point in case))
    columns = ["queued below, up to", *(f"{binary(a)}, {binary(b)}" for a, b in points)]
    columns += ["PyTorch", "thrown away", "default / best"]
    found = {(b["model"], b["fuse"], b["figure"]): b for b in results["best"]}
    lines = []
    for figure, title in QUEUE_FIGURES.items():
        if all(r[figure] is None for r in results["rows"]):
            continue
        lines.append([f"*{title}*", *(len(columns) - 1) * [""]])
        for (model, fuse), case in cases.items():
            line = [f"{model}, fuse={fuse}"]
            for point in points:
                cell = queue_cell(case.get(point), figure)
                is_default = point in case and case[point]["default"]
                line += bold([cell]) if is_default else [cell]
            line += [queue_cell(others.get((model, role)), figure) for role in ("stock", "floor")]
            best = found.get((model, fuse, figure))
            line.append("" if best is None else best_cell(best))
            lines.append(line)
    return table(columns, lines, results)


def queue_cell(result: dict | None, figure: str) -> str:
    """Returns a figure of a row."""
    if result is None or result[figure] is None:
        return ""
    if figure == "peak_bytes":
        return f"{result[figure] / 1e9:.3f}"
    return f"{result[figure] / 1000:#.4g} ms"


def best_cell(best: dict) -> str:
    """Returns how far the default is from the best point, and which that is."""
    point = f"{binary(best['below'])}, {binary(best['bytes'])}"
    return f"{best['default_over_best']:.3f} ({point})"


def binary(nbytes: int) -> str:
    """Returns bytes with a binary unit."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >> shift:
            return f"{nbytes >> shift} {unit}"
    return str(nbytes)


COUNTERS: dict[str, Callable[[dict], str]] = {
    "call": lambda r: r["case"],
    "us": lambda r: f"{r['us']:.1f}",
    "DRAM GB/s": lambda r: f"{r['dram_gb_per_s']:.0f}",
    "moved / needed": lambda r: f"{r['moved_over_needed']:.3f}",
    "sectors a load": lambda r: f"{r['sectors_per_load']:.1f}",
    "sectors a store": lambda r: f"{r['sectors_per_store']:.1f}",
    "occupancy": lambda r: f"{r['occupancy_percent']:.0f}%",
    "registers": lambda r: f"{r['registers']:.0f}",
}


def counters_block(device: str) -> str:
    """Returns the block ``counters DEVICE``."""
    results = load(f"counters_{device}")
    lines = [[escape(text(r)) for text in COUNTERS.values()] for r in results["rows"]]
    return table(list(COUNTERS), lines, results)


FAMILIES_OF_RANKS = {"bf16": "bfloat16 parameters", "autocast": "autocast", "fsdp2": ""}


def monitor_block(device: str) -> str:
    """Returns the block ``monitor DEVICE``."""
    results = load(f"monitor_{device}")
    columns = ["window, T tokens in each of K", "time", "looking, host", "looking, GPU"]
    columns += ["of a micro-batch", "of the window"]
    lines = []
    for r in results["rows"]:
        what = f"{r['way']}, T={r['tokens']}, K={r['micro_batches']}"
        line = [what, duration(1e6 * r["window_s"])]
        if r["way"] == "nothing":
            lines.append([*line, "", "", "", ""])
            continue
        looking = [duration(1e6 * r["host_s"]), duration(1e6 * r["gpu_s"])]
        shares = [r["of_micro_batch"], max(r["host_s"], r["gpu_s"]) / r["window_s"]]
        lines.append([*line, *looking, *(f"{share:.2%}" for share in shares)])
    return table(columns, lines, results)


def loops_block(device: str) -> str:
    """Returns the block ``loops DEVICE``."""
    results = load(f"loops_{device}")
    columns = ["loop", "tokens/s", "over the library's", "peak GB", "first loss", "last loss"]
    alone = {(r["tokens"], r["library"]): r for r in results["rows"] if r["way"] == "alone"}
    lines, tokens = [], None
    for r in results["rows"]:
        if r["tokens"] != tokens:
            tokens = r["tokens"]
            title = f"*{tokens:,} tokens a micro-batch, {r['micro_batches']} a window*"
            lines.append([title, *(5 * [""])])
        is_alone, peer = r["way"] == "alone", alone.get((tokens, r["library"]))
        peak = "" if r["allocated_bytes"] is None else f"{r['allocated_bytes'] / 1e9:.1f}"
        ratio = "" if is_alone or peer is None else f"{peer['window_s'] / r['window_s']:.3f}"
        line = [f"{r['library']}, {r['way']}", f"{r['tokens_per_s']:,.0f}", ratio, peak]
        line += [f"{r['first_loss']:.4f}", f"{r['last_loss']:.4f}"]
        lines.append(line if is_alone else bold(line))
    return table(columns, lines, results)


def ranks_block(device: str, *options: str) -> str:
    """Returns the block ``ranks DEVICE [buckets|blocks|costs|model]``."""
    tables = {
        (): windows_table,
        ("buckets",): buckets_table,
        ("blocks",): blocks_table,
        ("costs",): costs_tables,
        ("model",): model_table,
    }
    if options not in tables:
        names = "buckets, blocks, costs or model"
        raise RenderError(f"ranks DEVICE takes {names}, got {' '.join(options)}")
    if not (RESULTS / f"ranks_{device}.json").is_file():
        return "Not measured yet.\n"
    return tables[options](load(f"ranks_{device}"))


def windows_table(results: dict) -> str:
    """Returns the table of all ways, by the tokens of a micro-batch."""
    rows = [r for r in results["rows"] if r["section"] in ("ways", "options")]
    counts = sorted({r["micro_batches"] for r in rows})
    columns = [f"tokens/s of {results['world_size']} GPUs", *(f"K={count}" for count in counts)]
    columns += ["reduction alone", "exposed, K=1", "share", "peak GB", "reserved GB"]
    lines = []
    for tokens in dict.fromkeys(r["tokens"] for r in rows):
        lines.append([f"*{tokens} tokens a micro-batch*", *(len(columns) - 1) * [""]])
        ways: dict[tuple, dict[int, dict]] = {}
        for r in rows:
            if r["tokens"] == tokens:
                way = r["section"], r["role"], r["family"], r["name"]
                ways.setdefault(way, {})[r["micro_batches"]] = r
        for (section, role, family, name), by_count in ways.items():
            again = "once more" if (section, role) == ("options", "ours") else ""
            title = ", ".join(filter(None, [name, FAMILIES_OF_RANKS[family], again]))
            line = [escape(title), *window_cells(by_count, counts)]
            lines.append(bold(line) if (section, role) == ("ways", "ours") else line)
        lines += rank_ratios(ways, counts, len(columns))
    return table(columns, lines, results)


def window_cells(by_count: dict[int, dict], counts: Sequence[int]) -> list[str]:
    """Returns the cells of a way: its speed by micro-batches, its reduction and its memory."""
    cells = [f"{by_count[k]['tokens_per_s']:,.0f}" if k in by_count else "" for k in counts]
    one = by_count.get(1, {})
    cells += [duration(one[key]) if key in one else "" for key in ("reduction_us", "exposed_us")]
    cells.append(f"{one['exposed_share']:.0%}" if "exposed_share" in one else "")
    for key in ("allocated_bytes", "reserved_bytes"):
        peaks = [r[key] for r in by_count.values() if r[key] is not None]
        cells.append(f"{max(peaks) / 1e9:.1f}" if peaks else "")
    return cells


def rank_ratios(
    ways: dict[tuple, dict[int, dict]], counts: Sequence[int], width: int
) -> list[list[str]]:
    """Returns lines of our speed over that of each peer, the faster one of FSDP2's ways."""
    rates: dict[tuple, float] = {}
    for (section, role, family, _), by_count in ways.items():
        for count, r in by_count.items() if section == "ways" else ():
            key = role, family, count
            rates[key] = max(rates.get(key, 0.0), r["tokens_per_s"])
    lines = []
    for family in ("bf16", "autocast", "fsdp2"):
        for peer, name in ((("ddp", family), "DDP"), (("fsdp2", "fsdp2"), "FSDP2's best")):
            pairs = [(rates.get(("ours", family, k)), rates.get((*peer, k))) for k in counts]
            ratios = [f"{own / other:.3f}" if own and other else "" for own, other in pairs]
            if any(ratios):
                ours = FAMILIES_OF_RANKS[family] or "over FSDP2"
                title = f"attach / {name}, {ours}"
                lines.append([title, *ratios, *(width - 1 - len(ratios)) * [""]])
    return lines


def buckets_table(results: dict) -> str:
    """Returns the table of bucket sizes: a window of one micro-batch."""
    rows = [r for r in results["rows"] if r["section"] == "buckets"]
    lengths = list(dict.fromkeys(r["tokens"] for r in rows))
    by_case = {(r["name"], r["bucket_bytes"], r["tokens"]): r for r in rows}
    columns = ["reduced by", "buckets of"]
    for tokens in lengths:
        columns += [f"window, T={tokens}", "exposed", "share"]
    lines = []
    for name, n_bytes in dict.fromkeys((r["name"], r["bucket_bytes"]) for r in rows):
        line = [escape(name), binary(n_bytes)]
        for r in (by_case.get((name, n_bytes, tokens)) for tokens in lengths):
            line += [time_of(r), *(window_cells({1: r}, [1])[2:4] if r else ["", ""])]
        lines.append(line)
    return table(columns, lines, results)


def blocks_table(results: dict) -> str:
    """Returns the table of what a reduction shares with backward: a window of one micro-batch."""
    rows = [r for r in results["rows"] if r["section"] == "blocks"]
    lines = [[escape(r["name"]), time_of(r), *window_cells({1: r}, [1])[1:4]] for r in rows]
    columns = ["", "window", "reduction alone", "exposed", "share"]
    return table(columns, lines, results)


def costs_tables(results: dict) -> str:
    """Returns the tables of all_reduce, and of forward and backward."""
    lines = [
        [binary(r["bytes"]), duration(r["seconds"] * 1e6), f"{r['bus_gb_per_s']:.1f}"]
        for r in results["all_reduce"]
    ]
    passes = [
        [
            f"T={r['tokens']}, {FAMILIES_OF_RANKS[r['family']]}",
            *(duration(r[key] * 1e6) for key in ("forward_s", "backward_s")),
        ]
        for r in results["micro_batches"]
    ]
    collective = table(["all\\_reduce of float32", "time", "bus GB/s"], lines, results)
    return collective + "\n" + table(["a micro-batch", "forward", "backward"], passes, results)


def model_table(results: dict) -> str:
    """Returns what more ranks would cost a window, by a model."""
    figures = model_ranks.Figures(**model_ranks.figures_of(results))
    rows = model_ranks.rows_of(figures)
    ways = list(dict.fromkeys(r["way"] for r in rows))
    lines = []
    for ranks in model_ranks.RANKS:
        lines.append([f"*{ranks:,} ranks, modelled*", *(5 * [""])])
        for way in ways:
            found = [r for r in rows if (r["ranks"], r["way"]) == (ranks, way)]
            times = [duration(r["exposed_s"] * 1e6) for r in found]
            one = found[0]
            line = [escape(way), f"{one['bytes'] / 1e9:.1f}", duration(one["busy_s"] * 1e6), *times]
            lines.append(bold(line) if way == "attach, float32" else line)
    counts = model_ranks.MICRO_BATCHES
    columns = [f"T={figures.tokens:,}", "GB sent, K=1", "links busy, K=1"]
    return table([*columns, *(f"exposed, K={count}" for count in counts)], lines, results)


def rates_of(results: dict) -> str:
    """Returns the sentence that says where the floors come from."""
    rates = results["rates"]
    return (
        f"Floors: the larger of arithmetic at {rates['matmul_tflops']:.0f} TFLOP/s, the fastest "
        f"matmul of the run, and bytes at {rates['copy_gb_per_s']:.0f} GB/s, a copy.\n"
    )


BLOCKS = {
    "accumulate": accumulate_block,
    "multi_tensor": multi_tensor_block,
    "targets": targets_block,
    "training": training_block,
    "accuracy": accuracy_block,
    "eager": eager_block,
    "wgrad": wgrad_block,
    "embedding": embedding_block,
    "close": close_block,
    "memory": memory_block,
    "master_params": master_params_block,
    "hook": hook_block,
    "queue": queue_block,
    "counters": counters_block,
    "monitor": monitor_block,
    "loops": loops_block,
    "ranks": ranks_block,
}


def render_document(path: Path) -> str:
    """Returns a document's text with its blocks rewritten."""
    text = path.read_text()

    def rewrite(match: re.Match) -> str:
        begin, name, _, end = match.groups()
        kind, *arguments = name.split() or [""]
        if kind not in BLOCKS or not arguments:
            raise RenderError(f"{path.name}: no generated block is called {name!r}")
        expected = inspect.signature(BLOCKS[kind]).parameters
        if len(arguments) > len(expected) and "options" not in expected:
            raise RenderError(f"{path.name}: block {name!r}: {kind} takes no option")
        if len(arguments) < len(expected) - ("options" in expected):
            raise RenderError(f"{path.name}: block {name!r}: {kind} takes {' '.join(expected)}")
        try:
            return begin + BLOCKS[kind](*arguments) + end
        except RenderError as error:
            raise RenderError(f"{path.name}: block {name!r}: {error}") from None

    rewritten, count = BLOCK.subn(rewrite, text)
    if count != text.count("<!-- generated:") or count != text.count("<!-- end generated -->"):
        raise RenderError(f"{path.name}: a generated block without its begin or its end")
    return rewritten


def accumulate_data() -> dict | None:
    """Returns what docs/accumulate.png shows: a large bf16 tensor of all results files."""
    found = []
    for path in sorted(RESULTS.glob("accumulate_*.json")):
        results = json.loads(path.read_text())
        found.append((compact(results)[0], results["environment"]["device"]))
    if not found:
        return None
    case, device = max(found, key=lambda entry: largeness(entry[0]))
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


def draw_accumulate(data: dict):
    """Draws the time of each way as a bar, and the floor as a line."""
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
    return figure


CURVES = {
    ("accumulate_ (add)", "cuda"): "accumulate_ (add), cuda",
    ("accumulate_ (add)", "triton"): "accumulate_ (add), triton",
    ("torch.compile: main.add_(grad.float(), alpha=s)", "torch"): "torch.compile",
    ("main.add_(grad)", "torch"): "main.add_(grad)",
    ("grad_dtype=float32: main.add_(grad.float())", "torch"): "main.add_(grad.float())",
    (CHAIN, "torch"): "main.add_(grad) + unscale, check + norm",
}


def gpu_results(benchmark: str) -> dict | None:
    """Returns the first results of a benchmark on a GPU that tell cold from warm."""
    for path in sorted(RESULTS.glob(f"{benchmark}_*.json")):
        results = json.loads(path.read_text())
        if is_gpu(results) and "cache" in results["rows"][0]:
            return results
    return None


def sizes_data() -> dict | None:
    """Returns what docs/sizes.png shows: the speed of ways by size, in bf16, cold and warm."""
    results = gpu_results("accumulate")
    if results is None:
        return None
    panels = []
    for cache, title in (("cold", "caches cold"), ("warm", "gradient just written")):
        curves = []
        for (name, backend), label in CURVES.items():
            rows = [r for r in results["rows"] if (r["name"], r["backend"]) == (name, backend)]
            points = [
                [r["n"], 10 * r["n"] / r["p50_us"] / 1e3]
                for r in rows
                if (r["cache"], r["dtype"]) == (cache, "bf16")
            ]
            if points:
                curves.append([label, backend, sorted(points)])
        panels.append([title, curves])
    return {
        "title": f"Adding a bfloat16 gradient into float32, {results['environment']['device']}",
        "copy": results["copy_gb_per_s"],
        "panels": panels,
    }


def draw_sizes(data: dict):
    """Draws bandwidth over size: a curve for each way, and a line for the copy."""
    from matplotlib import pyplot

    colors = {"cuda": "#1f6fb4", "triton": "#7fb2dd"}
    peers = ["#c98b2b", "#7a7f85", "#b0493a", "#6d8f3c"]
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for axes, (title, curves) in zip(panels, data["panels"], strict=True):
        others = iter(peers)
        for label, backend, points in curves:
            sizes, speeds = zip(*points, strict=True)
            axes.plot(
                sizes,
                speeds,
                label=label,
                color=colors.get(backend) or next(others),
                linewidth=2.5 if backend == "cuda" else 1.3,
                marker="o",
                markersize=4,
            )
        axes.axhline(data["copy"], color="black", linewidth=1, linestyle="--", label="a copy")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("elements")
        axes.set_title(title, loc="left", fontsize="medium")
        axes.grid(axis="y", linewidth=0.5, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("10 B per element / time, GB/s")
    panels[0].set_ylim(bottom=0)
    panels[0].legend(frameon=False, fontsize="small", loc="upper left")
    figure.suptitle(data["title"], x=0.01, ha="left")
    return figure


def roofline_data() -> dict | None:
    """Returns what docs/roofline.png shows: operations a byte and a second, 2^28 and one list."""
    results = gpu_results("accumulate")
    if results is None:
        return None
    device = results["environment"]["device"]
    rows = [r for r in results["rows"] if r["case"] == "2^28" and r["dtype"] != "fp16"]
    lists = gpu_results("multi_tensor")
    if lists is not None and lists["environment"]["device"] == device:
        rows += [r for r in lists["rows"] if r["case"] == "llama-3.2-1b" and r["headline"]]
    points = []
    for r in rows:
        if is_cold(r) and r["flops"]:
            case = "" if r["tensors"] == 1 else f", {r['case']}"
            backend = "" if r["backend"] == "torch" else f", {r['backend']}"
            rate = r["flops"] / r["p50_us"] / 1e3
            # matplotlib leaves out of a legend what begins with an underscore
            name = f"torch.{r['name']}" if r["name"].startswith("_") else r["name"]
            points.append([name + backend + case, r["flops"] / r["bytes"], rate, r["backend"]])
    title = f"One tensor of 2^28 elements or a list, caches cold, {device}"
    return {"title": title, "copy": results["copy_gb_per_s"], "points": points}


def draw_roofline(data: dict):
    """Draws each way's arithmetic against the roof that a copy's bandwidth makes."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 5), layout="constrained")
    reach = [0.05, 0.7]
    roof = [data["copy"] * x for x in reach]
    label = f"a copy: {data['copy']:.0f} GB/s"
    axes.plot(reach, roof, color="black", linewidth=1, linestyle="--", label=label)
    colors = {"cuda": "#1f6fb4", "triton": "#7fb2dd", "torch": "#b0493a"}
    markers = "osD^vPX*<>hp"
    counts = dict.fromkeys(colors, 0)
    for name, intensity, rate, backend in data["points"]:
        marker = markers[counts[backend] % len(markers)]
        counts[backend] += 1
        axes.plot(
            [intensity],
            [rate],
            marker,
            color=colors[backend],
            label=f"{name}: {rate / intensity / data['copy']:.2f}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    intensities, rates = [0.06, 0.1, 0.2, 0.3, 0.4, 0.5], [100, 200, 400, 700, 1000, 2000]
    axes.set_xticks(intensities, [str(tick) for tick in intensities])
    axes.set_yticks(rates, [str(tick) for tick in rates])
    axes.minorticks_off()
    axes.set_xlabel("operations per byte moved")
    axes.set_ylabel("GFLOP/s")
    axes.grid(linewidth=0.5, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        frameon=False,
        fontsize="small",
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        title="share of the copy's bandwidth",
    )
    axes.set_title(data["title"], loc="left")
    return figure


def training_data() -> dict | None:
    """Returns what docs/training.png shows: times of each way over PyTorch's, by tokens."""
    files = sorted(RESULTS.glob("training_*.json"))
    results = next((r for r in map(json.loads, (f.read_text() for f in files)) if is_gpu(r)), None)
    if results is None:
        return None
    panels = []
    for family, window, title in (
        ("bf16", 1, "bfloat16 parameters"),
        ("autocast", 8, "float32 parameters under autocast"),
    ):
        case = training_case(results, family, window)
        stock = case.get("stock", {})
        curves = []
        for key, by_length in case.items():
            if (family, key) == ("autocast", "floor"):
                continue  # no floor for a way that casts weights less often
            name = next(iter(by_length.values()))["name"]
            points = [
                [t, by_length[t]["p50_us"] / stock[t]["p50_us"]] for t in by_length if t in stock
            ]
            curves.append([key, name, points])
        panels.append([title, curves])
    device = results["environment"]["device"]
    return {"title": f"GPU time of a micro-batch of a 1.5B Llama, {device}", "panels": panels}


def is_gpu(results: dict) -> bool:
    """Tells whether results were measured on a GPU."""
    return results["environment"]["driver"] is not None


def draw_training(data: dict):
    """Draws time over PyTorch's against tokens, a panel for each dtype of the parameters."""
    from matplotlib import pyplot

    colors = {"ours": "#1f6fb4", "hook": "#7fb2dd", "stock": "black", "floor": "#7a7f85"}
    peers = ["#c98b2b", "#b0493a", "#6d8f3c"]
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axes, (title, curves) in zip(panels, data["panels"], strict=True):
        others = iter(peers)
        for key, name, points in curves:
            if not points:
                continue
            lengths, ratios = zip(*points, strict=True)
            axes.plot(
                lengths,
                ratios,
                label=name,
                color=colors.get(key) or next(others),
                linewidth=2.5 if key == "ours" else 1.3,
                linestyle="--" if key == "floor" else "-",
                marker="o" if key != "stock" else None,
                markersize=4,
            )
        axes.set_xscale("log", base=2)
        ticks = sorted({t for _, _, points in curves for t, _ in points})
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.set_xlabel("tokens in a micro-batch")
        axes.set_title(title, loc="left", fontsize="medium")
        axes.grid(axis="y", linewidth=0.5, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    panels[0].set_ylabel("time / PyTorch's")
    figure.suptitle(data["title"], x=0.01, ha="left")
    return figure


PICTURES = {
    "accumulate.png": (accumulate_data, draw_accumulate),
    "sizes.png": (sizes_data, draw_sizes),
    "roofline.png": (roofline_data, draw_roofline),
    "training.png": (training_data, draw_training),
}


def render_picture(name: str, is_check: bool) -> Path | None:
    """Redraws a picture where its data or the way it is drawn changed; returns it if it was.

    The file carries a digest of both, since other versions of matplotlib give other pixels.
    """
    collect, draw = PICTURES[name]
    path, data = ROOT / "docs" / name, collect()
    if data is None:
        return None
    drawn_from = json.dumps(data) + inspect.getsource(draw)
    digest = f"sha256 {hashlib.sha256(drawn_from.encode()).hexdigest()}"
    if path.is_file() and digest.encode() in path.read_bytes():
        return None
    if not is_check:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        path.parent.mkdir(exist_ok=True)
        figure = draw(data)
        figure.savefig(path, dpi=150, metadata={"Source": digest})
        pyplot.close(figure)
    return path


def render(is_check: bool) -> list[Path]:
    """Renders all; returns the files that changed, or would."""
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    rendered = {path: render_document(path) for path in documents if path.is_file()}
    changed = [path for path, text in rendered.items() if text != path.read_text()]
    if not is_check:
        for path in changed:
            path.write_text(rendered[path])
    drawn = (render_picture(name, is_check) for name in PICTURES)
    return changed + [path for path in drawn if path is not None]


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
