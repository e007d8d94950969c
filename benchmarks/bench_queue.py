"""The sweep behind which gradients are added when they arrive, and which wait for a common launch.

    python benchmarks/bench_queue.py --json benchmarks/results/queue_h200.json

A gradient of at least QUEUE_BELOW bytes is added by a launch of its own, while L2 may still hold
it; smaller ones wait until there are QUEUE_BYTES of them, or backward ends. Whole models bring
their gradients as backward makes them: ResNet-50 in channels_last, a mixture of experts of many
small layers, GPT-2 and a Llama, with bfloat16 parameters. One micro-batch adds to sums that exist:
on the wall's clock, its backward as the host sees it, in a CUDA graph, and the peak of memory.

The models take turns, round by round, and in a round all settings follow each other, in an order
that is rotated by the next; each is attached anew to the same model. A setting is compared with the
default of the same round: the medians of these ratios tell which is the best. The best of many is
partly luck: what it wins has to be seen beside the spread of the rounds.

Each setting's sum of two micro-batches is first compared with that of PyTorch's single gradients.

On the CPU the models are of a toy's size: a check of the code, not a measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import eager
import report
import resnet
import torch
from environment import environment
from gradient_ways import Attached, Stock, ThrownAway
from timing import capture, capture_stream, release, time_replays
from torch import Tensor, nn
from torch.nn import functional

from gradacc_kernels import hook

KIB, MIB = 1 << 10, 1 << 20
DEFAULT = (MIB, 32 * MIB)
BELOW = (0, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 1 << 30)
BYTES = (4 * MIB, 8 * MIB, 32 * MIB, 128 * MIB)
QUICK_BELOW, QUICK_BYTES = (0, MIB, 1 << 30), (8 * MIB, 32 * MIB)
SECONDS, QUICK_SECONDS = 170.0, 60.0  # of all rounds together
MIN_ROUNDS = 2
EAGER_SAMPLES = 4  # a round
GRAPH_SECONDS = 0.15
# Relative, from PyTorch's gradients, which are rounded by 2^-9 of an element, shared ones twice;
# attention's backward adds in another order each time.
NEAR = 2.0**-6
FIGURES = {
    "gpu_us": "GPU time, in a CUDA graph",
    "wall_us": "wall clock",
    "host_us": "host, backward alone",
    "peak_bytes": "peak of memory",
}
METHOD = {
    "wall_us": "forward and backward of a micro-batch that adds, eager, until the GPU has ended",
    "host_us": "the call of its backward",
    "gpu_us": "the same micro-batch in a CUDA graph",
    "over_default": "median over rounds of the ratio to the default setting's median",
    "peak_bytes": "allocated at the most in a micro-batch, over the model and its data",
}


# The models


class Experts(nn.Module):
    """A layer of MLPs, each of which takes an equal share of the tokens.

    A fixed permutation takes the place of a balanced router's choice, so that shapes do not depend
    on data and no two tokens are added by atomics. A trained gate weighs what an expert returns.
    """

    def __init__(self, width: int, hidden: int, count: int, n_tokens: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, hidden, bias=False),
                nn.SiLU(),
                nn.Linear(hidden, width, bias=False),
            )
            for _ in range(count)
        )
        order = torch.randperm(n_tokens)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("back", order.argsort(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [tokens, width]; so is x."""
        count = len(self.experts)
        routed = self.norm(x).index_select(0, self.order).unflatten(0, (count, -1))
        shares = self.gate(routed).softmax(-1).diagonal(dim1=0, dim2=2)  # [tokens / count, count]
        outputs = [expert(part) for expert, part in zip(self.experts, routed.unbind(), strict=True)]
        y = torch.stack(outputs) * shares.t().unsqueeze(-1)
        return x + y.flatten(0, 1).index_select(0, self.back)


class MixtureOfExperts(nn.Module):
    """A language model of such layers alone."""

    def __init__(self, vocabulary: int, width: int, hidden: int, layers: int, experts: int, n: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Experts(width, hidden, experts, n) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean cross entropy; tokens and targets are int64 [n]."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return functional.cross_entropy(self.head(self.norm(x)).float(), targets)


def mixture_of_experts(n_tokens: int, vocabulary: int, **sizes: int) -> eager.Model:
    """Returns the mixture of experts."""

    def build(dtype, device):
        with device:
            return MixtureOfExperts(vocabulary, n=n_tokens, **sizes).to(dtype)

    def batch(n, dtype, device):
        text = torch.randint(vocabulary, (n + 1,), device=device)
        return {"tokens": text[:-1].contiguous(), "targets": text[1:].contiguous()}, n

    return eager.Model(build, batch, lambda model, arguments: model(**arguments))


def image_classifier(is_toy: bool) -> eager.Model:
    """Returns ResNet-50."""
    width = 32 if is_toy else 224

    def build(dtype, device):
        with device:
            model = resnet.ResNet((1, 1), 8) if is_toy else resnet.ResNet()
        return model.train().to(dtype=dtype, memory_format=torch.channels_last)

    def batch(n, dtype, device):
        images = torch.randn((n, 3, width, width), device=device).to(dtype)
        labels = torch.randint(1000, (n,), device=device)
        return {"images": images.contiguous(memory_format=torch.channels_last), "labels": labels}, n

    return eager.Model(build, batch, lambda model, arguments: model(**arguments))


def gpt2(known: eager.Model) -> eager.Model:
    """Returns eager.py's GPT-2, whose attention is the same in a graph as without.

    transformers looks for packed sequences on the host, which a capture does not allow: it then
    takes every batch for one, whose mask rules flash attention out. Ours are not packed.
    """

    def build(dtype, device):
        from transformers import masking_utils

        if hasattr(masking_utils, "find_packed_sequence_indices"):
            masking_utils.find_packed_sequence_indices = lambda position_ids: None
        return known.build(dtype, device)

    return dataclasses.replace(known, build=build)


def models(is_toy: bool) -> dict[str, tuple[eager.Model, int]]:
    """Returns the models, each with the images or tokens of a micro-batch."""
    known = eager.models(is_toy)
    if is_toy:
        sizes = {"vocabulary": 64, "width": 16, "hidden": 8, "layers": 2, "experts": 4}
        counts = 2, 32, 32, 16
    else:
        sizes = {"vocabulary": 8192, "width": 512, "hidden": 256, "layers": 8, "experts": 32}
        counts = 32, 4096, 4096, 1024
    made = {
        "ResNet-50": image_classifier(is_toy),
        "8 x 32 experts": mixture_of_experts(counts[1], **sizes),
        "GPT-2": gpt2(known["gpt2"]),
        "Llama-1.5B": known["llama-1.5b"],
    }
    return {name: (model, n) for (name, model), n in zip(made.items(), counts, strict=True)}


MODELS = tuple(models(is_toy=True))


# The settings


@dataclass
class Setting:
    """A way to sum, and what was measured of it.

    Attributes:
        name: for the tables.
        role: "floor", "stock", or "attach".
        set_up: makes a model use it.
        fuse: of attach.
        policy: QUEUE_BELOW and QUEUE_BYTES.
        rounds: a dict of figures for each round, the medians of its samples.
    """

    name: str
    role: str
    set_up: Callable[[nn.Module], Stock]
    fuse: bool | None = None
    policy: tuple[int, int] | None = None
    timer: str | None = None
    rounds: list[dict[str, float | None]] = field(default_factory=list)


@contextlib.contextmanager
def queueing(policy: tuple[int, int], device: torch.device) -> Iterator[None]:
    """Has attach use these QUEUE_BELOW and QUEUE_BYTES."""
    before = hook.QUEUE_BELOW[device.type], hook.QUEUE_BYTES
    hook.QUEUE_BELOW[device.type], hook.QUEUE_BYTES = policy
    try:
        yield
    finally:
        hook.QUEUE_BELOW[device.type], hook.QUEUE_BYTES = before


def attached(policy: tuple[int, int], fuse: bool, module: nn.Module) -> Attached:
    """Attaches under a policy."""
    with queueing(policy, next(module.parameters()).device):
        return Attached(module, fuse=fuse)


def size(nbytes: int) -> str:
    """Returns bytes with a binary unit."""
    for unit, name in ((1 << 30, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit:
            return f"{nbytes // unit} {name}"
    return str(nbytes)


def policies(is_quick: bool) -> list[tuple[int, int]]:
    """Returns the grid: a cross through the default."""
    below, limit = (QUICK_BELOW, QUICK_BYTES) if is_quick else (BELOW, BYTES)
    grid = [(b, DEFAULT[1]) for b in below] + [(DEFAULT[0], b) for b in limit]
    return list(dict.fromkeys(grid))


def settings(is_quick: bool) -> list[Setting]:
    """Returns what is measured of each model, none of it measured yet."""
    found = [
        Setting("gradients thrown away", "floor", ThrownAway),
        Setting("PyTorch bf16 .grad", "stock", Stock),
    ]
    for fuse in (False, True):
        for policy in policies(is_quick):
            name = f"fuse={'auto' if fuse else False}, {size(policy[0])}, {size(policy[1])}"
            found.append(
                Setting(name, "attach", partial(attached, policy, fuse), fuse=fuse, policy=policy)
            )
    return found


# Measuring


@dataclass
class Loop:
    """A model with its data and settings.

    Attributes:
        module: to which settings are attached in turn.
        twin: a copy, which alone has hooks that stay: queueing ends where others have hooks.
        reference: some elements of the sum of two micro-batches.
        is_captured: whether CUDA graphs of the model work.
    """

    name: str
    model: eager.Model
    module: nn.Module
    twin: nn.Module
    batches: list[dict[str, Tensor]]
    settings: list[Setting]
    reference: Tensor | None = None
    is_captured: bool = True

    def loss(self, module: nn.Module, index: int) -> Tensor:
        """Runs forward."""
        return self.model.loss(module, self.batches[index])

    def micro_batch(self, module: nn.Module, index: int = 0) -> None:
        """Runs forward and backward."""
        self.loss(module, index).backward()


def allocated() -> int:
    """Returns bytes on the GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def synchronize() -> None:
    """Waits for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clear(module: nn.Module) -> None:
    """Drops all gradients."""
    for param in module.parameters():
        param.grad = None


def reference_of(loop: Loop) -> Tensor:
    """Returns elements of PyTorch's gradients of two micro-batches, summed in float32."""
    total: list[Tensor] = []
    for index in range(2):
        clear(loop.module)
        loop.micro_batch(loop.module, index)
        grads = [p.grad.float() for p in loop.module.parameters() if p.grad is not None]
        total = grads if not total else torch._foreach_add(total, grads)
    clear(loop.module)
    return eager.sample_of(total)


def make(name: str, device: torch.device, is_quick: bool) -> Loop:
    """Builds a model, and what its sums are compared with."""
    model, n = models(is_toy=device.type == "cpu")[name]
    torch.manual_seed(0)
    module = model.build(torch.bfloat16, device)
    torch.manual_seed(1)
    batches = [model.batch(n, torch.bfloat16, device)[0] for _ in range(2)]
    twin = copy.deepcopy(module)
    loop = Loop(name, model, module, twin, batches, settings(is_quick))
    loop.reference = reference_of(loop)
    release()
    return loop


def check(loop: Loop, sums: Stock) -> None:
    """Raises RuntimeError where a sum of two micro-batches, just made, is not PyTorch's."""
    error = eager.relative_error(
        eager.sample_of([grad for grad in sums.grads() if grad is not None]), loop.reference
    )
    if not error <= NEAR:
        raise RuntimeError(f"expected at most {NEAR:.3g} from PyTorch's gradients, got {error:.3g}")


def sample(loop: Loop, module: nn.Module) -> tuple[float, float]:
    """Returns microseconds of a micro-batch on the wall's clock, and of backward on the host."""
    synchronize()
    begin = time.perf_counter()
    loss = loop.loss(module, 0)
    before = time.perf_counter()
    loss.backward()
    returned = time.perf_counter()
    synchronize()
    return (time.perf_counter() - begin) * 1e6, (returned - before) * 1e6


def eager_figures(loop: Loop, module: nn.Module, before: int) -> dict[str, float | None]:
    """Returns a round's figures without graphs; the module's sums exist.

    Args:
        loop: what is measured.
        module: its model, or the twin.
        before: bytes that were allocated without sums.
    """
    peak = None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    samples = [sample(loop, module) for _ in range(EAGER_SAMPLES)]
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() - before
    wall, host = (statistics.median(column) for column in zip(*samples, strict=True))
    return {"wall_us": wall, "host_us": host, "peak_bytes": peak}


def graph_time(
    loop: Loop, module: nn.Module, setting: Setting, failures: list[str]
) -> float | None:
    """Returns the GPU time of a micro-batch; None where there is no GPU, or no graph."""
    if not torch.cuda.is_available() or not loop.is_captured:
        return None
    loop.is_captured = False
    with report.survived(f"{loop.name}, {setting.name}: the rest without graphs", failures):
        graph = capture(partial(loop.micro_batch, module))
        try:
            timing = time_replays(graph, seconds=GRAPH_SECONDS, min_repetitions=5)
        finally:
            graph.reset()
        loop.is_captured = True
        setting.timer = timing.timer
        return timing.p50
    return None


def choose_next_stream() -> None:
    """Has attach's second stream be the one after ours in torch's pool of 32.

    Else it would be another in every turn, and in some of them our own, beside which nothing runs.
    """
    if torch.cuda.is_available():
        while torch.cuda.Stream() != capture_stream():
            pass


def turn(loop: Loop, setting: Setting, failures: list[str]) -> None:
    """Measures a setting once: attaches it, checks its sum in the first round, and detaches."""
    module = loop.twin if setting.role == "floor" else loop.module
    sums = None
    gc.collect()  # what the last one has left
    choose_next_stream()
    before = allocated()
    try:
        if setting.role != "floor" or not setting.rounds:
            sums = setting.set_up(module)  # hooks that throw away stay
        clear(module)
        loop.micro_batch(module, 0)
        loop.micro_batch(module, 1)
        if setting.role == "attach" and not setting.rounds:
            check(loop, sums)
        figures = eager_figures(loop, module, before)
        figures["gpu_us"] = graph_time(loop, module, setting, failures)
        setting.rounds.append(figures)
    finally:
        clear(module)
        if isinstance(sums, Attached):
            sums.accumulator.detach()


def play(loop: Loop, number: int, failures: list[str]) -> None:
    """Measures a round of a model; a setting that fails has no other."""
    ahead = number * 7 % max(1, len(loop.settings))
    order = loop.settings[ahead:] + loop.settings[:ahead]
    gc.collect()
    gc.disable()
    try:
        for setting in order:
            done = len(setting.rounds)
            with report.survived(f"{loop.name}, {setting.name}", failures):
                turn(loop, setting, failures)
            if len(setting.rounds) == done:
                loop.settings.remove(setting)
    finally:
        gc.enable()


# Rows and tables


def median(values: Sequence[float | None]) -> float | None:
    """Returns the median of those that are there."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def default_of(loop: Loop, setting: Setting) -> Setting | None:
    """Returns the setting with which one is compared: fuse=False's for those without attach."""
    fuse = bool(setting.fuse)
    found = (s for s in loop.settings if s.policy == DEFAULT and s.fuse == fuse)
    return next(found, None)


def rows_of(loop: Loop) -> list[dict]:
    """Returns a row for each setting."""
    rows = []
    for s in loop.settings:
        if not s.rounds:
            continue
        default = default_of(loop, s)
        figures = {name: median([r[name] for r in s.rounds]) for name in FIGURES}
        ratios: dict[str, list[float]] = {name: [] for name in FIGURES}
        for own, other in zip(s.rounds, default.rounds if default else [], strict=False):
            for name in FIGURES:
                if own[name] and other[name]:
                    ratios[name].append(own[name] / other[name])
        rows.append(
            {
                "model": loop.name,
                "name": s.name,
                "role": s.role,
                "fuse": None if s.fuse is None else "auto" if s.fuse else "False",
                "below": s.policy and s.policy[0],
                "bytes": s.policy and s.policy[1],
                "default": s.policy == DEFAULT,
                **{name: None if v is None else round(v, 1) for name, v in figures.items()},
                "over_default": {
                    name: [round(r, 4) for r in (median(rs), min(rs), max(rs))] if rs else None
                    for name, rs in ratios.items()
                },
                "timer": s.timer,
                "rounds": len(s.rounds),
            }
        )
    return rows


def best(rows: Sequence[dict]) -> list[dict]:
    """Returns for each model, fuse and time the best point, and how far the default is from it."""
    found = []
    groups: dict[tuple[str, str], list[dict]] = {}
    for r in rows:
        if r["role"] == "attach":
            groups.setdefault((r["model"], r["fuse"]), []).append(r)
    for (model, fuse), group in groups.items():
        for figure in ("gpu_us", "wall_us", "host_us"):
            there = [r for r in group if r["over_default"][figure]]
            if not there:
                continue
            top = min(there, key=lambda r: r["over_default"][figure][0])
            ratio, least, most = top["over_default"][figure]
            found.append(
                {
                    "model": model,
                    "fuse": fuse,
                    "figure": figure,
                    "below": top["below"],
                    "bytes": top["bytes"],
                    "default_over_best": round(1 / ratio, 4),
                    "in_rounds": [round(1 / most, 4), round(1 / least, 4)],
                }
            )
    return found


def summary(rows: Sequence[dict], found: Sequence[dict]) -> str:
    """Returns the tables that a run ends with."""

    def milliseconds(name: str) -> Callable[[dict], str]:
        return lambda r: "" if r[name] is None else f"{r[name] / 1e3:.3f}"

    def ratio(name: str) -> Callable[[dict], str]:
        return lambda r: f"{r['over_default'][name][0]:.3f}" if r["over_default"][name] else ""

    columns = {
        "model": lambda r: r["model"],
        "gradients": lambda r: r["name"] + (" (default)" if r["default"] else ""),
        "timer": lambda r: r["timer"] or "",
        "GPU ms": milliseconds("gpu_us"),
        "/ default": ratio("gpu_us"),
        "wall ms": milliseconds("wall_us"),
        "/ default ": ratio("wall_us"),
        "backward, host ms": milliseconds("host_us"),
        "/ default  ": ratio("host_us"),
        "peak GB": lambda r: "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.3f}",
        "rounds": lambda r: str(r["rounds"]),
    }
    best_columns = {
        "model": lambda r: r["model"],
        "fuse": lambda r: r["fuse"],
        "figure": lambda r: FIGURES[r["figure"]],
        "best": lambda r: f"{size(r['below'])}, {size(r['bytes'])}",
        "default / best": lambda r: f"{r['default_over_best']:.4f}",
        "in rounds": lambda r: "{:.4f} to {:.4f}".format(*r["in_rounds"]),
    }
    return "\n\n".join(
        [report.table(rows, columns, n_text=3), report.table(found, best_columns, n_text=4)]
    )


def run(options: argparse.Namespace, device: torch.device, failures: list[str]) -> None:
    """Measures in rounds until the time is over; saves after each."""
    measured_with = environment(device)
    loops: list[Loop] = []
    for name in options.models:
        with report.survived(name, failures):
            loops.append(make(name, device, options.quick))
            params = list(loops[-1].module.parameters())
            elements = sum(param.numel() for param in params)
            report.say(f"{name}: {len(params)} parameters, {elements:,} elements")
    rows: list[dict] = []
    end = time.perf_counter() + options.seconds
    number, last = 0, 0.0
    while number < MIN_ROUNDS or time.perf_counter() + last < end:
        begin = time.perf_counter()
        for loop in loops:
            play(loop, number, failures)
            report.say(f"{loop.name}: round {number + 1}")
        rows = [row for loop in loops for row in rows_of(loop)]
        if options.json:
            report.save(options.json, measured_with, rows, method=METHOD, best=best(rows))
        last = time.perf_counter() - begin
        number += 1
        if device.type == "cpu" and number == MIN_ROUNDS:
            break
    if rows:
        print(summary(rows, best(rows)))


def main() -> None:
    """Runs what was asked for; prints tables, and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--quick", action="store_true", help="fewer points and rounds")
    parser.add_argument("--seconds", type=float, help="of all rounds together; there are two")
    parser.add_argument(
        "--models",
        type=lambda text: text.split(","),
        default=list(MODELS),
        metavar=",".join(MODELS),
    )
    parser.add_argument("--json", type=Path, help="results file to write", metavar="PATH")
    options = parser.parse_args()
    if not set(options.models) <= set(MODELS):
        parser.error(f"--models must be of {', '.join(MODELS)}, got {','.join(options.models)}")
    options.seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    device = torch.device(report.device(parser, options.device))
    if device.type == "cpu":
        report.say("toy models: on the CPU this checks the code, and measures nothing")
    failures: list[str] = []
    # All on the stream of the captures: autograd's nodes keep that on which they were made.
    on_stream = (
        torch.cuda.stream(capture_stream()) if device.type == "cuda" else contextlib.nullcontext()
    )
    with on_stream:
        run(options, device, failures)
    report.end(failures)


if __name__ == "__main__":
    main()
