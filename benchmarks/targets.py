"""Targets of a benchmark, set against what it measured: a table, and entries of the results."""

from __future__ import annotations

from collections.abc import Sequence


def find(rows: Sequence[dict], **labels) -> dict | None:
    """Returns the row with these labels, cold unless told; timed in a graph where one was.

    Wall-clock rows are no GPU time and are left out.
    """
    labels = {"cache": "cold", **labels}
    found = [
        r
        for r in rows
        if all(r.get(key) == value for key, value in labels.items())
        and (r["timer"] != "wall" or "host_us" not in r or r["host_us"] is None)
    ]
    return max(found, key=lambda r: r["timer"].startswith("graph"), default=None)


def value(row: dict | None, key: str) -> float | None:
    """Returns an entry of a row, if there is one."""
    return None if row is None else row[key]


def ratio(one: dict | None, other: dict | None, key: str) -> float | None:
    """Returns the quotient of an entry of two rows, if both are there."""
    return None if one is None or other is None else one[key] / other[key]


def target(name: str, measured: float | None, bound: float, *, at_most: bool = False) -> dict:
    """Returns a target's entry; one that was not measured is neither met nor missed."""
    met = None if measured is None else (measured <= bound if at_most else measured >= bound)
    return {
        "name": name,
        "target": f"{'<=' if at_most else '>='} {bound:g}",
        "measured": None if measured is None else round(measured, 4),
        "met": met,
    }


def table(targets: Sequence[dict]) -> str:
    """Returns the targets as text."""
    width = max(len(t["name"]) for t in targets)
    lines = [f"{'target':{width}}  {'':>9}  measured  met"]
    for t in targets:
        measured = "" if t["measured"] is None else f"{t['measured']:.4g}"
        verdict = {None: "not measured", True: "yes", False: "NO"}[t["met"]]
        lines.append(f"{t['name']:{width}}  {t['target']:>9}  {measured:>8}  {verdict}")
    return "\n".join(lines)
