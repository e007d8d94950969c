"""What reducing gradients costs at 8, 64 and 1,024 ranks: a model. Nothing was run on so many.

    python benchmarks/model_ranks.py benchmarks/results/ranks_h200.json

From the file come the figures that were measured on a few ranks of one node; the others are
assumed, and printed as such. Without a file all are assumed. Each can be given: --backward-s 0.02.

A collective of S bytes over R ranks on M nodes of G takes what NCCL's own tuner expects of it
(NCCL 2.20, src/graph/tuning.cc), the least over its protocols Simple and LL128; NVLink SHARP is
left out, and so is whatever else runs on the network:

    ring, half    launch + (R - 1) / R S / (share B) + (R - 1 - M) node + M network
    ring          the same, with all terms but launch twice
    tree          launch + 2 S / (share B) + 2 (R / M - 1) node + 2 log2(M) network
    B = node_bandwidth, or on several nodes min(node_bandwidth, G network_bandwidth)

An all-reduce is a ring or a tree, a reduce-scatter or all-gather half a ring. Launch, the steps
over NVLink and over the network and the share of B are NCCL's, RINGS and TREES below. In one node M
counts as 0, and there are rings only. B is the bus bandwidth of nccl-tests. Every ring crosses from
a node to the next once, and those of a node share all its NICs, so that B has G of them.

The n buckets of a backward that takes t are ready at t / n, 2 t / n, ... t, in proportion to their
bytes, and travel one after another. What of them ends after the backward is exposed: with equal
buckets, max(time of the last, time of all - (t - t / n)). Arithmetic is taken to run as fast as
without them. FSDP2 gathers bfloat16 weights layer by layer, ahead of time as far as its links
allow, in forward and again in backward, and scatters float32 gradients; its model is a bound from
below. It divides the memory of weights and gradients by R too, which the others do not.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import report

RANKS = (8, 64, 1024)
MICRO_BATCHES = (1, 4, 16)
DDP_BUCKET = 25 << 20
FP32, BF16 = 4, 2  # bytes
EACH = "DDP, float32, each micro-batch"
BUCKETS = [1 << power for power in range(20, 33)]


@dataclass(frozen=True)
class Algorithm:
    """A way of NCCL's: seconds of a launch and of a step, and the share of bandwidth it reaches."""

    launch_s: float
    node_s: float
    network_s: float
    share: float


# Of the protocols Simple and LL128, the latter with 120 bytes of 128.
RINGS = (Algorithm(8.4e-6, 3.4e-6, 14e-6, 1.0), Algorithm(14e-6, 1.9e-6, 4e-6, 0.92))
TREES = (Algorithm(0, 28e-6, 28e-6, 0.92), Algorithm(14e-6, 1.25e-6, 8.5e-6, 0.92 * 120 / 128))


def _figure(default: float, what: str):
    return field(default=default, metadata={"what": what})


@dataclass(frozen=True)
class Figures:
    """What the model is fed with. Seconds, bytes, and bytes a second and GPU."""

    elements: int = _figure(1_498_482_688, "parameters: the 1.5B Llama of the training benchmark")
    layers: int = _figure(16, "that FSDP2 gathers one by one")
    tokens: int = _figure(2048, "in a micro-batch of a rank")
    forward_s: float = _figure(0.012, "of a micro-batch")
    backward_s: float = _figure(0.024, "of a micro-batch")
    node_bandwidth: float = _figure(329e9, "bus bandwidth inside of a node, of 1 GiB and more")
    network_bandwidth: float = _figure(50e9, "a NIC of 400 Gb/s a GPU")
    gpus_per_node: int = _figure(8, "with a NIC each")
    least_s: float = _figure(10e-6, "of a collective, however small")
    latency: float = _figure(1.0, "a factor for NCCL's table of latencies")
    bucket_bytes: int = _figure(256 << 20, "of attach, in float32")


def measured(path: Path, tokens: int | None = None) -> dict[str, float]:
    """Returns the figures that a results file has measured: see figures_of.

    Raises:
        ValueError: an entry is missing, or the number of tokens.
    """
    try:
        return figures_of(json.loads(path.read_text()), tokens)
    except KeyError as error:
        raise ValueError(
            f"{path}: expected world_size, all_reduce [bytes, seconds] and micro_batches [tokens, "
            f"forward_s, backward_s], got no {error}"
        ) from error


def figures_of(found: dict, tokens: int | None = None) -> dict[str, float]:
    """Returns the figures that a run has measured.

    Args:
        found: ``world_size``, of one node; ``all_reduce``, a list of {"bytes", "seconds"} on it;
            ``micro_batches``, a list of {"tokens", "forward_s", "backward_s"}; and if they are not
            the usual ones ``elements`` and ``layers``.
        tokens: of which micro-batch, the first of these; None for the first of all.

    Raises:
        KeyError: an entry is missing, or the number of tokens.
    """
    calls = sorted((call["bytes"], call["seconds"]) for call in found["all_reduce"])
    (_, least), (nbytes, seconds) = calls[0], calls[-1]
    share = 2 * (found["world_size"] - 1) / found["world_size"]
    of_length = [b for b in found["micro_batches"] if tokens in (None, b["tokens"])]
    if not of_length:
        raise KeyError(tokens)
    batch = of_length[0]
    figures = {name: batch[name] for name in ("tokens", "forward_s", "backward_s")}
    figures |= {name: found[name] for name in ("elements", "layers") if name in found}
    return figures | {"node_bandwidth": share * nbytes / seconds, "least_s": least}


def all_reduce(figures: Figures, ranks: int, nbytes: float) -> float:
    """Returns the seconds of one all-reduce."""
    nodes = math.ceil(ranks / figures.gpus_per_node)
    times = [_ring(figures, ranks, nbytes, ring, passes=2) for ring in RINGS]
    for tree in TREES if nodes > 1 else ():
        steps = (math.ceil(ranks / nodes) - 1) * tree.node_s + math.log2(nodes) * tree.network_s
        latency = figures.latency * (tree.launch_s + 2 * steps)
        times.append(2 * nbytes / (tree.share * _bandwidth(figures, nodes)) + latency)
    return max(figures.least_s, min(times)) if ranks > 1 else 0.0


def half_reduce(figures: Figures, ranks: int, nbytes: float) -> float:
    """Returns the seconds of one reduce-scatter or all-gather, of all ranks' bytes together."""
    times = [_ring(figures, ranks, nbytes, ring, passes=1) for ring in RINGS]
    return max(figures.least_s, min(times)) if ranks > 1 else 0.0


def _ring(figures: Figures, ranks: int, nbytes: float, ring: Algorithm, passes: int) -> float:
    nodes = math.ceil(ranks / figures.gpus_per_node)
    crossing = nodes if nodes > 1 else 0
    steps = (ranks - 1 - crossing) * ring.node_s + crossing * ring.network_s
    sending = (ranks - 1) / ranks * nbytes / (ring.share * _bandwidth(figures, nodes))
    return figures.latency * (ring.launch_s + passes * steps) + passes * sending


def _bandwidth(figures: Figures, nodes: int) -> float:
    if nodes == 1:
        return figures.node_bandwidth
    return min(figures.node_bandwidth, figures.gpus_per_node * figures.network_bandwidth)


@dataclass(frozen=True)
class Cost:
    """Bytes that a rank sends, seconds in which links are busy, and those that are exposed."""

    nbytes: float
    busy_s: float
    exposed_s: float

    def times(self, times: int) -> Cost:
        """Returns the cost of so many of it."""
        return Cost(times * self.nbytes, times * self.busy_s, times * self.exposed_s)


def exposed(times: Sequence[float], shares: Sequence[float], backward_s: float) -> float:
    """Returns by how much collectives outlast a backward.

    Args:
        times: seconds of each, in order.
        shares: the share of the backward after which each may begin.
        backward_s: of the backward.
    """
    end = 0.0
    for seconds, share in zip(times, shares, strict=True):
        end = max(end, share * backward_s) + seconds
    return max(0.0, end - backward_s)


def reduced(figures: Figures, ranks: int, element: int, bucket_bytes: int) -> Cost:
    """Returns the cost of all-reducing the gradients of one backward.

    Args:
        figures: of the machine and model.
        ranks: how many.
        element: bytes of a gradient's element on the way.
        bucket_bytes: of them.
    """
    nbytes = element * figures.elements
    bounds = [*range(0, nbytes, bucket_bytes), nbytes]
    sizes = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
    times = [all_reduce(figures, ranks, size) for size in sizes]
    late = exposed(times, [end / nbytes for end in bounds[1:]], figures.backward_s)
    return Cost(2 * (ranks - 1) / ranks * nbytes, sum(times), late if ranks > 1 else 0.0)


def sharded(figures: Figures, ranks: int) -> Cost:
    """Returns the least that FSDP2 can cost a micro-batch: two gathers and a scatter a layer.

    Exposed in forward: max(a gather, all gathers - the layers but the last); in backward: max(a
    gather and a scatter, all of them - backward).
    """
    layers = figures.layers
    elements = figures.elements / layers
    gather = half_reduce(figures, ranks, BF16 * elements)
    scatter = half_reduce(figures, ranks, FP32 * elements)
    forward = max(gather, layers * gather - figures.forward_s * (layers - 1) / layers)
    backward = max(gather + scatter, layers * (gather + scatter) - figures.backward_s)
    nbytes = (ranks - 1) / ranks * figures.elements * (2 * BF16 + FP32)
    return Cost(nbytes, layers * (2 * gather + scatter), forward + backward)


def ways(figures: Figures, ranks: int, micro_batches: int) -> dict[str, Cost]:
    """Returns what a window costs, by the way in which it is reduced."""
    bucket = figures.bucket_bytes
    fp32 = reduced(figures, ranks, FP32, DDP_BUCKET)
    bf16 = reduced(figures, ranks, BF16, DDP_BUCKET)
    return {
        "attach, float32": reduced(figures, ranks, FP32, bucket),
        "attach, float32, best buckets": reduced(figures, ranks, FP32, best(figures, ranks)),
        "attach, reduce_dtype=bfloat16": reduced(figures, ranks, BF16, max(1, bucket // 2)),
        "DDP, float32, no_sync": fp32,
        "DDP, bfloat16, no_sync": bf16,
        EACH: fp32.times(micro_batches),
        "DDP, bfloat16, each micro-batch": bf16.times(micro_batches),
        "FSDP2, each micro-batch, at least": sharded(figures, ranks).times(micro_batches),
    }


def best(figures: Figures, ranks: int) -> int:
    """Returns the power of two of bytes that as bucket_bytes of float32 exposes the least."""
    return min(BUCKETS, key=lambda size: reduced(figures, ranks, FP32, size).exposed_s)


def rows_of(figures: Figures) -> list[dict]:
    """Returns the table's rows: all ways, ranks and numbers of micro-batches."""
    rows = []
    for ranks in RANKS:
        for k in MICRO_BATCHES:
            costs = ways(figures, ranks, k)
            arithmetic = k * (figures.forward_s + figures.backward_s)
            for name, cost in costs.items():
                row = {"ranks": ranks, "micro_batches": k, "way": name}
                row |= {"bytes": cost.nbytes, "busy_s": cost.busy_s, "exposed_s": cost.exposed_s}
                row["of_arithmetic"] = cost.exposed_s / arithmetic
                row["of_each"] = cost.exposed_s / costs[EACH].exposed_s
                rows.append(row)
    return rows


COLUMNS = {
    "way": lambda r: r["way"],
    "ranks": lambda r: str(r["ranks"]),
    "K": lambda r: str(r["micro_batches"]),
    "GB sent": lambda r: f"{r['bytes'] / 1e9:.1f}",
    "links busy ms": lambda r: f"{1e3 * r['busy_s']:.1f}",
    "exposed ms": lambda r: f"{1e3 * r['exposed_s']:.2f}",
    "of arithmetic": lambda r: f"{r['of_arithmetic']:.1%}",
    "of DDP each": lambda r: f"{r['of_each']:.3f}",
}

FIGURE_COLUMNS = {
    "figure": lambda r: r["name"],
    "is": lambda r: r["source"],
    "of": lambda r: r["what"],
    "value": lambda r: f"{r['value']:.6g}" if isinstance(r["value"], float) else f"{r['value']:,}",
}


def main() -> None:
    """Prints what was assumed, and the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", type=Path, nargs="?", help="a results file of a few ranks")
    parser.add_argument("--json", type=Path)
    for figure in fields(Figures):
        name = "--" + figure.name.replace("_", "-")
        parser.add_argument(name, type=type(figure.default), help=figure.metadata["what"])
    options = parser.parse_args()
    given = {f.name: getattr(options, f.name) for f in fields(Figures)}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        found = measured(options.measured, options.tokens) if options.measured else {}
        figures = Figures(**(found | given))
        if min(asdict(figures).values()) <= 0:
            raise ValueError("figures must be positive")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    sources = dict.fromkeys(found, "measured") | dict.fromkeys(given.keys() - {"tokens"}, "given")
    used = [
        {
            "name": figure.name,
            "value": getattr(figures, figure.name),
            "source": sources.get(figure.name, "assumed"),
            "what": figure.metadata["what"],
        }
        for figure in fields(Figures)
    ]
    rows = rows_of(figures)
    print("A MODEL: nothing was run on these numbers of ranks.\n")
    print(report.table(used, FIGURE_COLUMNS, n_text=3))
    for ranks in RANKS:
        shown = [row for row in rows if row["ranks"] == ranks]
        print(f"\n{report.table(shown, COLUMNS, n_text=1)}")
        print(f"bucket_bytes that exposes the least: {best(figures, ranks) >> 20} MiB")
    if options.json:
        environment = {"is": "a model", "measured": str(options.measured), "buckets": BUCKETS}
        report.save(options.json, environment, rows, figures=used)


if __name__ == "__main__":
    main()
