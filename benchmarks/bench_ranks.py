"""Windows of a 1.5B-parameter Llama on several GPUs: ours against DDP and FSDP2.

    torchrun --nproc_per_node=2 benchmarks/bench_ranks.py --json benchmarks/results/ranks_h200.json

A window clears ``.grad``, runs K micro-batches of T tokens on each rank, and reduces in the last of
them; it has no optimizer step. Times are what a clock on the wall shows, of the slowest rank. A way
is alone in memory while it is measured. rank_ways.py has the ways.

- ways: tokens a second, and the peak of memory; at K = 1 also the time of a window's reduction that
  is not hidden behind backward (the window less one that does not reduce, in turns), and for ours
  that of the reduction of the whole buffer with nothing beside it.
- options: other settings of ours, and ours once more, which shows how far clocks have drifted.
- buckets: the sizes of buckets.
- blocks: what of a reduction is not hidden: without the embedding, whose gradient comes last, with
  fewer thread blocks of NCCL, and by copies without what they do about it.
- all_reduce: the time of a collective by its size.

No way begins after ``--seconds``: the results name what was skipped. On the CPU a model of a toy's
size is reduced by gloo: a check of the code, not a measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import llama
import rank_ways
import report
import targets
import torch
import torch.distributed as dist
from environment import environment
from rank_ways import Attached, Loop, Way
from timing import Timing, release, sample_wall, wall_timing

T = TypeVar("T")

SECTIONS = ["all_reduce", "ways", "blocks", "options", "buckets"]
METHOD = {
    "window": "zero_grad(set_to_none=True), K micro-batches and the reduction; no optimizer step",
    "time": "wall clock of the slowest rank, median",
    "exposed": "K = 1: the window less one that does not reduce, in turns, median",
    "reduction": "all buckets, nothing beside them, median",
    "memory": "of torch's allocator and symmetric memory in a window, the most of all ranks",
}
TIMEOUT = timedelta(seconds=60)  # of a collective for which another rank does not come
MOST_SAMPLES = 20
LEAST_MICRO_BATCHES = 2  # of a sample, so that the first one's launches weigh less
HIDDEN = 0.15  # the largest share of its reduction that a window of one micro-batch may show
HIDDEN_TOKENS = 4096


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        shape: of the model.
        tokens: of a micro-batch.
        counts: of micro-batches in a window, in rising order, from 1 on.
        buckets: their bytes.
        reduced_by: of attach's ways to reduce.
        thread_blocks: the most that NCCL may use.
        log2_bytes: the sizes of all_reduce.
        seconds: of samples, for each row.
        least_samples: for each row.
    """

    shape: llama.Shape
    tokens: tuple[int, ...]
    counts: tuple[int, ...]
    buckets: tuple[int, ...]
    reduced_by: tuple[str, ...]
    thread_blocks: tuple[int, ...]
    log2_bytes: range
    seconds: float
    least_samples: int

    def shortened(self) -> Plan:
        """Returns the first part of it."""
        return dataclasses.replace(
            self,
            tokens=self.tokens[:1],
            counts=self.counts[:2],
            buckets=self.buckets[:2],
            seconds=self.seconds / 2,
        )


PLANS = {
    "cuda": Plan(
        llama.Shape(),
        tokens=(4096, 1024),
        counts=(1, 4, 16),
        buckets=tuple(mib << 20 for mib in (16, 64, 256)),
        reduced_by=("copies", "all_reduce"),
        thread_blocks=(8, 16),
        log2_bytes=range(20, 33),
        seconds=1.0,
        least_samples=3,
    ),
    "cpu": Plan(
        llama.Shape(256, width=64, layers=2, heads=4, kv_heads=2, mlp=128, positions=64),
        tokens=(16,),
        counts=(1, 2),
        buckets=(1 << 12, 1 << 16),
        reduced_by=("all_reduce",),
        thread_blocks=(),
        log2_bytes=range(10, 13),
        seconds=0,
        least_samples=2,
    ),
}


# What ranks do together


class Ranks:
    """The ranks of the run. What they agree on goes over the CPU, beside what is measured."""

    def __init__(self, device: torch.device, seconds: float):
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._end = time.perf_counter() + seconds

    def say(self, text: str) -> None:
        """Prints a line of progress, once."""
        if self.rank == 0:
            report.say(text)

    def barrier(self) -> None:
        """Waits for all of them."""
        dist.barrier(self._group)

    def largest(self, values: Sequence[float]) -> list[float]:
        """Returns the largest of all ranks at each place."""
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX, self._group)
        return found.tolist()

    def have_time(self) -> bool:
        """Tells whether no rank has come to the end of the run's time."""
        return not self.largest([time.perf_counter() > self._end])[0]

    def together(self, call: Callable[[], T]) -> T:
        """Returns what a call returns; raises on all ranks where it raises on one.

        What calls no collective, as running out of memory in a forward pass, ends well so. A rank
        that leaves others in a collective alone ends the run, at TIMEOUT.
        """
        result, failure = None, None
        try:
            result = call()
        except Exception as error:
            failure = error
        has_failed = self.largest([failure is not None])[0]
        if failure is not None:
            raise failure
        if has_failed:
            raise RuntimeError("failed on another rank")
        return result

    def sample(
        self, calls: Sequence[Callable[[], object]], count: int
    ) -> list[list[tuple[float, float]]]:
        """Returns (wall, host) microseconds of calls that take turns, of the slowest rank each."""
        flat: list[float] = []
        gc.disable()
        try:
            for _ in range(count):
                for call in calls:
                    flat += sample_wall(call, seconds=0, min_repetitions=1, before=self.barrier)[0]
        finally:
            gc.enable()
        slowest = self.largest(flat)
        pairs = list(zip(slowest[::2], slowest[1::2], strict=True))
        return [pairs[index :: len(calls)] for index in range(len(calls))]

    def peak_of(
        self, call: Callable[[], object], unseen_bytes: int
    ) -> tuple[float, dict[str, int | None]]:
        """Returns the microseconds of a call, and the most memory during it, the unseen with it."""
        names = ("allocated_bytes", "reserved_bytes")
        if self.device.type != "cuda":
            return self.sample([call], 1)[0][0][0], dict.fromkeys(names)
        release()
        torch.cuda.reset_peak_memory_stats()
        took = self.sample([call], 1)[0][0][0]
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        largest = self.largest([peak + unseen_bytes for peak in peaks])
        return took, dict(zip(names, map(int, largest), strict=True))


# Windows


def measure(
    section: str, way: Way, n_tokens: int, counts: Sequence[int], plan: Plan, ranks: Ranks
) -> Iterator[dict]:
    """Yields the rows of a way for one length: one for each number of micro-batches."""
    build = partial(way.build, plan.shape, n_tokens, max(2, *counts), ranks.device)
    loop = ranks.together(build)
    if loop.skips:
        ranks.together(partial(loop.window, 2, reduces=False))
    for _ in range(2):  # DDP makes its buckets anew after the first
        ranks.together(partial(loop.window, 2))
    for count in counts:
        found = ranks.together(partial(measure_window, loop, count, plan, ranks))
        row = {
            "section": section,
            "family": way.family,
            "name": way.name,
            "role": way.role,
            "tokens": n_tokens,
            "micro_batches": count,
            **found,
            "tokens_per_s": round(ranks.size * count * n_tokens / found["p50_us"] * 1e6, 1),
        }
        ranks.say(describe(row))
        yield row


def measure_window(loop: Loop, count: int, plan: Plan, ranks: Ranks) -> dict:
    """Returns the part of a row that is measured."""
    calls = max(1, LEAST_MICRO_BATCHES // count)

    def windows(reduces: bool = True) -> None:
        for _ in range(calls):
            loop.window(count, reduces)

    took, peaks = ranks.peak_of(windows, loop.unseen_bytes)
    wanted = int(plan.seconds * 1e6 / took)
    n_samples = min(MOST_SAMPLES, max(plan.least_samples, wanted))
    is_split = count == 1 and loop.skips
    ways = [windows, partial(windows, reduces=False)] if is_split else [windows]
    samples = ranks.sample(ways, n_samples)
    row = {**report.times(wall_timing(samples[0], calls)), **peaks}
    if is_split:
        differences = [(a[0] - b[0]) / calls for a, b in zip(*samples, strict=True)]
        row["exposed_us"] = round(statistics.median(differences), 3)
    if is_split and isinstance(loop, Attached):
        alone = wall_timing(ranks.sample([loop.reduce_alone], max(3, plan.least_samples))[0])
        row["bucket_bytes"] = loop.reducer.bucket_bytes
        row["reduction_us"] = round(alone.p50, 3)
        row["exposed_share"] = round(row["exposed_us"] / alone.p50, 4)
        halves = [loop.halves() for _ in range(max(3, plan.least_samples))]
        row["forward_s"], row["backward_s"] = map(statistics.median, zip(*halves, strict=True))
    return row


def measure_all_reduce(n_bytes: int, memory: torch.Tensor, ranks: Ranks) -> dict:
    """Returns the time of one all_reduce of float32, many of which follow each other."""
    calls = max(2, min(20, (1 << 30) // n_bytes)) if ranks.device.type == "cuda" else 2
    part = memory[: n_bytes // memory.itemsize]

    def reduce() -> None:
        for _ in range(calls):
            dist.all_reduce(part)

    timing: Timing = ranks.together(lambda: wall_timing(ranks.sample([reduce], 4)[0][1:], calls))
    seconds = timing.p50 / 1e6
    on_the_wire = 2 * (ranks.size - 1) / ranks.size * n_bytes
    row = {"bytes": n_bytes, "seconds": seconds, "bus_gb_per_s": on_the_wire / seconds / 1e9}
    ranks.say(f"all_reduce of {n_bytes} B: {timing.p50:.1f} us, {row['bus_gb_per_s']:.1f} GB/s")
    return row


# The run


def blocks(plan: Plan, sections: Sequence[str]) -> list[tuple[str, Way, int, Sequence[int]]]:
    """Returns what is measured with a new model each: section, way, tokens, micro-batches."""
    one = plan.counts[:1]
    found: list[tuple[str, Way, int, Sequence[int]]] = []
    for n_tokens in plan.tokens:
        found += [("ways", way, n_tokens, plan.counts) for way in rank_ways.WAYS]
    for reduce_by in plan.reduced_by:
        others: list[tuple[str, dict]] = [("", {}), ("no embedding", {"embeds": False})]
        if reduce_by == "copies":
            others += [("untouched rows too", {"is_whole": True})]
        else:
            limits = plan.thread_blocks
            others += [(f"{n} thread blocks", {"max_ctas": n}) for n in limits]
        ways = [rank_ways.reduced_by(reduce_by, words, **options) for words, options in others]
        found += [("blocks", way, plan.tokens[0], one) for way in ways]
    for n_tokens in plan.tokens:
        options = (*rank_ways.OPTIONS, *rank_ways.OURS)
        found += [("options", way, n_tokens, one) for way in options]
    for n_tokens in plan.tokens:
        for reduce_by in plan.reduced_by:
            for n_bytes in plan.buckets:
                way = rank_ways.reduced_by(reduce_by, bucket_bytes=n_bytes)
                found.append(("buckets", way, n_tokens, one))
    return [block for block in found if block[0] in sections]


def describe(row: dict) -> str:
    """Returns a line's worth of what a row found."""
    text = f"{row['section']}, T={row['tokens']}, K={row['micro_batches']}, {row['family']}, "
    text += f"{row['name']}: {row['p50_us'] / 1e3:.2f} ms, {row['tokens_per_s']:.0f} tokens/s"
    if "exposed_us" in row:
        text += f", {row['exposed_us'] / 1e3:.2f} ms exposed"
    if "reduction_us" in row:
        text += f" of {row['reduction_us'] / 1e3:.2f} ms"
    return text


def targets_of(rows: Sequence[dict]) -> list[dict]:
    """Returns what was aimed at: faster than each peer, and a reduction that is hidden."""
    rates: dict[tuple, dict[tuple, float]] = {}
    for r in rows:
        if r["section"] == "ways":
            case = rates.setdefault((r["tokens"], r["micro_batches"]), {})
            key = r["role"], r["family"]
            case[key] = max(case.get(key, 0.0), r["tokens_per_s"])
    found = []
    for (tokens, count), case in rates.items():
        for family in ("bf16", "autocast", "fsdp2"):
            ours = case.get(("ours", family))
            for peer, name in ((("ddp", family), "DDP"), (("fsdp2", "fsdp2"), "FSDP2")):
                if family == "fsdp2" and peer not in case:
                    continue  # DDP has no shards
                ratio = None if ours is None or peer not in case else ours / case[peer]
                title = f"T={tokens}, K={count}, {family}: tokens/s over {name}"
                found.append(targets.target(title, ratio, 1.0))
    for r in rows:
        is_aimed_at = (r["tokens"], r["micro_batches"]) == (HIDDEN_TOKENS, 1)
        is_ours = (r["section"], r["role"]) == ("ways", "ours") and "exposed_share" in r
        if is_ours and is_aimed_at:
            title = f"T={HIDDEN_TOKENS}, K=1, {r['family']}: exposed share of the reduction"
            found.append(targets.target(title, r["exposed_share"], HIDDEN, at_most=True))
    return found


def milliseconds(key: str) -> Callable[[dict], str]:
    """Returns a column of a time, empty where it was not measured."""
    return lambda r: "" if r.get(key) is None else f"{r[key] / 1e3:.2f}"


def gigabytes(key: str) -> Callable[[dict], str]:
    """Returns a column of memory, empty where it was not measured."""
    return lambda r: "" if r[key] is None else f"{r[key] / 1e9:.2f}"


COLUMNS: report.Columns = {
    "section": lambda r: r["section"],
    "parameters": lambda r: r["family"],
    "gradients": lambda r: r["name"],
    "bucket MiB": lambda r: f"{r['bucket_bytes'] / 2**20:g}" if "bucket_bytes" in r else "",
    "T": lambda r: str(r["tokens"]),
    "K": lambda r: str(r["micro_batches"]),
    "window ms": milliseconds("p50_us"),
    "tokens/s": lambda r: f"{r['tokens_per_s']:.0f}",
    "reduction ms": milliseconds("reduction_us"),
    "exposed ms": milliseconds("exposed_us"),
    "share": lambda r: f"{r['exposed_share']:.2f}" if "exposed_share" in r else "",
    "peak GB": gigabytes("allocated_bytes"),
    "reserved GB": gigabytes("reserved_bytes"),
}


@dataclass
class Results:
    """What a run has found so far."""

    environment: dict
    all_reduce: list[dict]
    rows: list[dict]
    skipped: list[str]
    failures: list[str]

    def save(self, path: Path, world_size: int) -> None:
        """Writes the results file."""
        halves = [
            {key: r[key] for key in ("family", "tokens", "forward_s", "backward_s")}
            for r in self.rows
            if r["section"] == "ways" and "forward_s" in r
        ]
        report.save(
            path,
            self.environment,
            self.rows,
            method=METHOD,
            world_size=world_size,
            all_reduce=self.all_reduce,
            micro_batches=halves,
            targets=targets_of(self.rows),
            skipped=self.skipped,
            failures=self.failures,
        )


def run(options: argparse.Namespace, ranks: Ranks) -> Results:
    """Measures what was asked for; saves after each block."""
    plan = PLANS[ranks.device.type]
    plan = plan.shortened() if options.quick else plan
    results = Results(environment(ranks.device), [], [], [], [])

    def attempt(what: str, call: Callable[[], None]) -> None:
        if ranks.have_time():
            with report.survived(what, results.failures):
                call()
            release()
        else:
            results.skipped.append(what)
            ranks.say(f"{what}: skipped, {options.seconds:.0f} s are over")
        if options.json and ranks.rank == 0:
            results.save(options.json, ranks.size)

    def all_reduce() -> None:
        def allocate() -> torch.Tensor:
            return torch.zeros(1 << plan.log2_bytes[-1] - 2, device=ranks.device)

        memory = ranks.together(allocate)
        for log2 in plan.log2_bytes:
            results.all_reduce.append(measure_all_reduce(1 << log2, memory, ranks))

    def block(section: str, way: Way, n_tokens: int, counts: Sequence[int]) -> None:
        for row in measure(section, way, n_tokens, counts, plan, ranks):
            results.rows.append(row)

    if "all_reduce" in options.sections:
        attempt("all_reduce", all_reduce)
    for section, way, n_tokens, counts in blocks(plan, options.sections):
        what = f"{section}, T={n_tokens}, {way.family}, {way.name}"
        attempt(what, partial(block, section, way, n_tokens, counts))
    return results


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--quick", action="store_true", help="one length, and fewer rows")
    parser.add_argument("--seconds", type=float, default=330, help="after which no way begins")
    parser.add_argument(
        "--sections",
        type=lambda text: text.split(","),
        default=SECTIONS,
        metavar=",".join(SECTIONS),
    )
    parser.add_argument("--json", type=Path, help="results file to write", metavar="PATH")
    options = parser.parse_args()
    if not set(options.sections) <= set(SECTIONS):
        parser.error(f"--sections must be of {','.join(SECTIONS)}")
    if "LOCAL_RANK" not in os.environ:
        parser.error("start the ranks by torchrun --nproc_per_node=2 benchmarks/bench_ranks.py")
    options.device = report.device(parser, options.device)
    return options


def main() -> None:
    """Runs what was asked for; prints a table, and writes the results file."""
    options = parse_arguments()
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    ranks = Ranks(device, options.seconds)
    if device.type == "cpu":
        ranks.say("toy model: on the CPU this checks the code, and measures nothing")
    gc.freeze()  # each way ends with a collection, which need not go through what was imported
    results = run(options, ranks)
    gc.unfreeze()
    if ranks.rank == 0 and results.rows:
        print(report.table(results.rows, COLUMNS, n_text=3), flush=True)
        if aimed_at := targets_of(results.rows):
            print(f"\n{targets.table(aimed_at)}", flush=True)
    ranks.barrier()
    dist.destroy_process_group()
    report.end(results.failures)


if __name__ == "__main__":
    main()
