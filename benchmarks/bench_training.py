"""A micro-batch of a 1.5B-parameter Llama, its gradients summed in each way.

    python benchmarks/bench_training.py --json benchmarks/results/training_h200.json
    python benchmarks/bench_training.py --eager --json benchmarks/results/eager_h200.json

The first is GPU time: forward and backward captured in CUDA graphs, so that no launch costs
anything. With bfloat16 parameters that is one micro-batch that adds to sums that exist; under
autocast a whole window of 8 from a cleared state, divided by 8, since the 16-bit copy of a weight
is made once a window there, or once a micro-batch, by the way that sums. Before it is timed, every
way's gradients are compared with float64, eager and captured, on a model of two such layers.

The second is what a clock on the wall shows of a loop without graphs, and the peak of memory, for
this model and for models of the transformers library: see eager.py.

On the CPU both run models of a toy's size, without graphs: a check of the code, not a measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import eager
import gradient_ways
import llama
import report
import torch
from environment import environment
from gradient_ways import Stock, Way
from timing import Timing, capture, release, sample_wall, time_replays, wall_timing
from torch import Tensor

WINDOW = 8  # micro-batches
FAMILIES = ["bf16", "autocast"]
TOKENS = {"cuda": [256, 512, 1024, 2048, 4096, 8192], "cpu": [16]}
QUICK_TOKENS = [256, 1024, 4096]
SHAPES = {
    "cuda": llama.Shape(),
    "cpu": llama.Shape(256, width=64, layers=3, heads=4, kv_heads=2, mlp=128, positions=64),
}
METHOD = {
    "bf16": "one captured micro-batch that adds to sums that exist",
    "autocast": "8 captured micro-batches from zero_grad on, the first of which stores; their time "
    "divided by 8, and with it what is done once a window: clearing, and under autocast the 16-bit "
    "copies of the weights, where the way keeps them",
    "accuracy": "relative L2 distance of a window's gradient from float64, on two layers",
}
CHECKED_TOKENS = {"cuda": 256, "cpu": 32}
NO_LARGER = 1.001  # backward itself is reproducible to a few digits: attention's uses atomics
NO_LARGER_EACH = 1.1  # for a single parameter, which may have few elements
SAME = 0.01  # how far the error of a replayed graph may be from that of the same code run eagerly


@dataclass
class Trainer:
    """A model, its way of summing, and data.

    Attributes:
        tokens: int64 [WINDOW, 1, T], targets alike: a micro-batch each.
    """

    model: llama.Llama
    sums: Stock
    way: Way
    tokens: Tensor
    targets: Tensor

    def micro_batch(self, index: int = 0) -> None:
        """Runs forward and backward."""
        with self.way.autocast(self.tokens.device):
            loss = self.model(self.tokens[index], self.targets[index])
        loss.backward()

    def window(self) -> None:
        """Sums all micro-batches, from a cleared state."""
        self.sums.zero()
        for index in range(len(self.tokens)):
            self.micro_batch(index)

    def warm_up(self) -> None:
        """Leaves sums that exist, after three stores and three adds."""
        for _ in range(3):
            self.sums.zero()
            self.micro_batch(0)
            self.micro_batch(1)

    def warm_up_window(self) -> None:
        """Leaves a cleared state, so that a capture has nothing to free."""
        self.warm_up()
        self.sums.zero()


def build(way: Way, shape: llama.Shape, n_tokens: int, device: torch.device) -> Trainer:
    """Returns a trainer; its weights and data are the same for every way."""
    model = llama.build(shape, way.dtype, device)
    text = random_text(shape, n_tokens, device)
    return Trainer(model, way.set_up(model), way, *text)


def random_text(shape: llama.Shape, n_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns tokens and targets, the same for every way."""
    generator = torch.Generator(device).manual_seed(1)
    text = torch.randint(
        shape.vocabulary, (WINDOW, 1, n_tokens + 1), generator=generator, device=device
    )
    return text[..., :-1].contiguous(), text[..., 1:].contiguous()


# Time


def time_step(
    step: Callable[[], object], warm_up: Callable[[], object], calls: int, is_quick: bool
) -> Timing:
    """Returns the time of one of a step's calls, in a graph where there is a GPU."""
    if not torch.cuda.is_available():
        warm_up()
        return wall_timing(sample_wall(step, seconds=0, min_repetitions=2), calls)
    graph = capture(step, warm_up)
    try:
        least = 3 if calls > 1 else 5
        return time_replays(
            graph, calls=calls, seconds=0.3 if is_quick else 0.6, min_repetitions=least
        )
    finally:
        graph.reset()


def time_way(
    way: Way, shape: llama.Shape, n_tokens: int, device: torch.device, is_quick: bool
) -> dict:
    """Returns a way's row for one length: a micro-batch that adds, or a window."""
    trainer = build(way, shape, n_tokens, device)
    calls, step, warm_up = {
        "bf16": (1, trainer.micro_batch, trainer.warm_up),
        "autocast": (WINDOW, trainer.window, trainer.warm_up_window),
    }[way.family]
    timing = time_step(step, warm_up, calls, is_quick)
    labels = {"family": way.family, "name": way.name, "role": way.role, "tokens": n_tokens}
    row = {**labels, "window": calls, **report.times(timing)}
    report.say(f"{describe(row)}: {timing.p50 / 1e3:.3f} ms, {timing.timer}")
    return row


def describe(row: dict) -> str:
    """Returns a line's worth of what a row is about."""
    mode = "adding" if row["window"] == 1 else f"window of {row['window']}"
    return f"T={row['tokens']} {row['family']}, {mode}, {row['name']}"


# Correctness


def exact_gradients(shape: llama.Shape, n_tokens: int, device: torch.device) -> list[Tensor]:
    """Returns a window's gradients with everything in float64."""
    model = llama.build(shape, torch.float64, device)
    tokens, targets = random_text(shape, n_tokens, device)
    for index in range(WINDOW):
        model(tokens[index], targets[index]).backward()
    return [param.grad for param in model.parameters()]


def errors(grads: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[float, list[float]]:
    """Returns the relative L2 error of all gradients, and of each."""
    squares = []
    for grad, truth in zip(grads, exact, strict=True):
        distance = torch.linalg.vector_norm(grad.double() - truth).square()
        squares.append(torch.stack([distance, torch.linalg.vector_norm(truth).square()]))
    distances, norms = torch.stack(squares).cpu().unbind(1)
    return float((distances.sum() / norms.sum()).sqrt()), (distances / norms).sqrt().tolist()


def measure_errors(
    way: Way, shape: llama.Shape, n_tokens: int, exact: Sequence[Tensor]
) -> tuple[float, list[float]]:
    """Returns a way's errors; what a replayed graph of a window sums has to be as exact.

    Raises:
        RuntimeError: it is not.
    """
    device = exact[0].device
    trainer = build(way, shape, n_tokens, device)
    trainer.window()
    found = errors(trainer.sums.grads(), exact)
    if device.type == "cuda":
        graph = capture(trainer.window, trainer.warm_up_window)
        graph.replay()
        torch.cuda.synchronize()
        replayed = errors(trainer.sums.grads(), exact)[0]
        graph.reset()
        if not abs(replayed / found[0] - 1) <= SAME:
            raise RuntimeError(
                f"expected a replayed graph to have eager's error, {found[0]:.4g}, got "
                f"{replayed:.4g}"
            )
    return found


def check_ways(
    ways: Sequence[Way], device: torch.device, failures: list[str]
) -> tuple[list[dict], list[Way]]:
    """Compares every way with float64 on two layers of the model.

    Returns:
        One row a way, and the ways that may be timed: ours only where its error is no larger than
        PyTorch's.
    """
    shape = dataclasses.replace(SHAPES[device.type], layers=2)
    n_tokens = CHECKED_TOKENS[device.type]
    exact = exact_gradients(shape, n_tokens, device)
    release()
    rows, good, found = [], [], {}
    # PyTorch's way first: it is the measure of ours, as is our way without fused modules.
    for way in sorted(ways, key=lambda way: way.role != "stock"):
        if way.role == "floor":
            good.append(way)
            continue
        what = f"{way.family}, {way.name}, two layers against float64"
        with report.survived(what, failures):
            error, each = measure_errors(way, shape, n_tokens, exact)
            report.say(f"{what}: relative L2 error {error:.3e}")
            rows.append({"family": way.family, "name": way.name, "role": way.role, "error": error})
            for role in {"hook": ("stock",), "ours": ("stock", "hook")}.get(way.role, ()):
                if (way.family, role) in found:
                    check_no_larger(role, error, each, *found[way.family, role])
            found[way.family, way.role] = error, each
            good.append(way)
        release()
    return rows, [way for way in ways if way in good]


def check_no_larger(
    role: str, error: float, each: Sequence[float], limit: float, limit_each: Sequence[float]
) -> None:
    """Raises RuntimeError where an error is larger than that of another role's way."""
    if not error <= NO_LARGER * limit:
        raise RuntimeError(f"expected at most {role}'s error, {limit:.6g}, got {error:.6g}")
    for index, (own, other) in enumerate(zip(each, limit_each, strict=True)):
        if not own <= NO_LARGER_EACH * other:
            raise RuntimeError(
                f"parameter {index}: expected at most {role}'s error, {other:.6g}, got {own:.6g}"
            )


# The run


def ratio_to(rows: Sequence[dict], role: str) -> Callable[[dict], str]:
    """Returns a column: time over that of a role, in the same mode and length."""
    keys = ("family", "window", "tokens")
    others = {tuple(r[k] for k in keys): r["p50_us"] for r in rows if r["role"] == role}

    def ratio(row: dict) -> str:
        other = others.get(tuple(row[k] for k in keys))
        return "" if other is None else f"{row['p50_us'] / other:.3f}"

    return ratio


def summary(rows: Sequence[dict], accuracy: Sequence[dict]) -> str:
    """Returns the table that a run ends with."""
    columns = {
        "parameters": lambda r: r["family"],
        "gradients": lambda r: r["name"],
        "window": lambda r: str(r["window"]),
        "timer": lambda r: r["timer"],
        "T": lambda r: str(r["tokens"]),
        "p20 ms": lambda r: f"{r['p20_us'] / 1e3:.3f}",
        "p50 ms": lambda r: f"{r['p50_us'] / 1e3:.3f}",
        "p80 ms": lambda r: f"{r['p80_us'] / 1e3:.3f}",
        "/ PyTorch": ratio_to(rows, "stock"),
        "/ thrown away": ratio_to(rows, "floor"),
    }
    order = sorted(rows, key=lambda r: (r["family"] == "autocast", r["window"], r["tokens"]))
    parts = [report.table(order, columns, n_text=4)] if rows else []
    if accuracy:
        error_columns = {
            "parameters": lambda r: r["family"],
            "gradients": lambda r: r["name"],
            "relative L2 error": lambda r: f"{r['error']:.4e}",
        }
        parts.append(report.table(accuracy, error_columns, n_text=2))
    return "\n\n".join(parts)


def run(options: argparse.Namespace, device: torch.device, failures: list[str]) -> None:
    """Checks and times all ways; saves after each length."""
    measured_with = environment(device)
    ways = [way for way in gradient_ways.all_ways() if way.family in options.families]
    accuracy: list[dict] = []
    if options.check:
        accuracy, ways = check_ways(ways, device, failures)
    rows: list[dict] = []
    for n_tokens in options.tokens:
        for way in ways:
            with report.survived(f"T={n_tokens}, {way.family}, {way.name}", failures):
                rows.append(time_way(way, SHAPES[device.type], n_tokens, device, options.quick))
            release()
        if options.json:
            report.save(options.json, measured_with, rows, method=METHOD, accuracy=accuracy)
    print(summary(rows, accuracy))


def integers(text: str) -> list[int]:
    """Parses a list of integers."""
    return [int(part) for part in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument(
        "--eager", action="store_true", help="wall clock and peak memory without graphs"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer lengths, models and repetitions"
    )
    parser.add_argument("--tokens", type=integers, metavar="256,1024", help="lengths")
    parser.add_argument(
        "--families",
        type=lambda text: text.split(","),
        default=FAMILIES,
        metavar=",".join(FAMILIES),
    )
    parser.add_argument(
        "--models",
        type=lambda text: text.split(","),
        metavar=",".join(eager.MODELS),
        help="with --eager: which models",
    )
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="without comparing with float64"
    )
    parser.add_argument("--json", type=Path, help="results file to write", metavar="PATH")
    options = parser.parse_args()
    for what, chosen, known in (
        ("--families", options.families, FAMILIES),
        ("--models", options.models or [], eager.MODELS),
    ):
        if not set(chosen) <= set(known):
            parser.error(f"{what} must be of {', '.join(known)}, got {','.join(chosen)}")
    if options.models and not options.eager:
        parser.error("--models needs --eager")
    options.device = report.device(parser, options.device)
    if options.tokens is None and not options.eager:
        is_short = options.quick and options.device == "cuda"
        options.tokens = QUICK_TOKENS if is_short else TOKENS[options.device]
    return options


def main() -> None:
    """Runs what was asked for; prints a table, and writes the results file."""
    options = parse_arguments()
    device = torch.device(options.device)
    if device.type == "cpu":
        report.say("toy models: on the CPU this checks the code, and measures nothing")
    failures: list[str] = []
    (eager.run if options.eager else run)(options, device, failures)
    report.end(failures)


if __name__ == "__main__":
    main()
