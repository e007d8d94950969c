"""Whether training with 16-bit parameters and float32 masters follows float32 training.

    python benchmarks/bench_master_params.py --json benchmarks/results/master_params_cpu.json

A small Llama over the bytes of Python's own modules is trained for 300 windows of 4 micro-batches
by AdamW, with a warm-up of a tenth, a linear decay to a tenth, and clipping at 1. All ways of a
seed start from the same weights, which bfloat16 holds, and get the same windows:

    float32             float32 throughout: what the others are compared with
    float32, autocast   float32 parameters, products in bfloat16: what 16-bit arithmetic costs
    masters             bfloat16 parameters, attach, MasterParams
    low bits            the same with low_bits=True; whether it has the same bits is told
    masters, 16-bit sum MasterParams over the sums of PyTorch's .grad
    16-bit AdamW        bfloat16 parameters, gradients and state, PyTorch's

A window's loss is the mean of its micro-batches', before its step. Held-out loss is of every tenth
module.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from environment import environment
from llama import Llama, Shape, build
from torch import Tensor

import gradacc_kernels as gk


@dataclass(frozen=True)
class Config:
    """Sizes of the model, of a micro-batch (sequences of context bytes), and of the run."""

    width: int
    layers: int
    heads: int
    context: int
    sequences: int
    lr: float
    windows: int = 300
    micro_batches: int = 4

    def shape(self) -> Shape:
        """Returns the model's."""
        return Shape(
            256, self.width, self.layers, self.heads, self.heads, 3 * self.width, self.context
        )


CONFIGS = {
    "cpu": Config(96, 2, 2, 64, 2, lr=1e-3),
    "cuda": Config(512, 4, 8, 256, 8, lr=1e-3),
}
AVERAGED = 10  # windows to a point of a curve


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        name: of the row.
        dtype: of the parameters.
        autocast: whether products are in bfloat16 all the same.
        attached: whether gradients are summed in float32 by attach.
        masters: options of MasterParams, or None for AdamW over the parameters.
    """

    name: str
    dtype: torch.dtype
    autocast: bool = False
    attached: bool = False
    masters: dict | None = None


REFERENCE, MASTERS, LOW_BITS = "float32", "masters", "low bits"
WAYS = (
    Way(REFERENCE, torch.float32),
    Way("float32, autocast", torch.float32, autocast=True),
    Way(MASTERS, torch.bfloat16, attached=True, masters={}),
    Way(LOW_BITS, torch.bfloat16, attached=True, masters={"low_bits": True}),
    Way("masters, 16-bit sum", torch.bfloat16, masters={}),
    Way("16-bit AdamW", torch.bfloat16),
)


class Training:
    """A model in training, and its losses."""

    def __init__(self, way: Way, config: Config, seed: int, device: torch.device):
        self.way, self.config, self.device = way, config, device
        self.model: Llama = build(config.shape(), way.dtype, device, seed)
        if way.attached:
            gk.attach(self.model)
        options = {"lr": config.lr, "fused": device.type == "cuda"}
        params = self.model.parameters()
        if way.masters is None:
            self.optimizer = torch.optim.AdamW(params, **options)
        else:
            self.optimizer = gk.MasterParams(params, torch.optim.AdamW, **way.masters, **options)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.share_of_lr)
        self.losses: list[float] = []  # of each window

    def share_of_lr(self, window: int) -> float:
        """Warm-up over a tenth of the windows, then linear to a tenth."""
        warm_up = self.config.windows // 10
        return min((window + 1) / warm_up, 1 - 0.9 * window / self.config.windows)

    def loss(self, text: Tensor) -> Tensor:
        """The mean loss, in nats a byte, of predicting each byte of [sequences, context + 1]."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.way.autocast):
            return self.model(text[:, :-1], text[:, 1:])

    def train(self, window: Tensor) -> None:
        """One step, on [micro-batches, sequences, context + 1]."""
        losses = []
        for text in window:
            loss = self.loss(text)
            (loss / len(window)).backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.losses.append(torch.stack(losses).mean().item())

    @torch.no_grad()
    def test(self, batches: Tensor) -> float:
        """Returns the mean loss."""
        return statistics.mean(self.loss(text).item() for text in batches)

    def curve(self) -> list[float]:
        """The mean loss of every ten windows."""
        return [
            statistics.mean(self.losses[i : i + AVERAGED])
            for i in range(0, len(self.losses), AVERAGED)
        ]


def read_modules() -> tuple[Tensor, Tensor]:
    """The bytes of Python's own top-level modules, and those of every tenth one, held out."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_bytes() for path in sorted(root.glob("*.py"))]
    if len(texts) < 50:
        raise SystemExit(f"expected the standard library's source in {root}, got {len(texts)}")
    held_out = b"".join(texts[::10])
    del texts[::10]
    both = (b"".join(texts), held_out)
    return tuple(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in both)


def sample(text: Tensor, batches: int, config: Config, generator: torch.Generator) -> Tensor:
    """Returns random pieces, int64 [batches, sequences, context + 1]."""
    shape = (batches, config.sequences, 1)
    starts = torch.randint(len(text) - config.context, shape, generator=generator)
    return text[starts + torch.arange(config.context + 1)].long()


def same_bits(one: Training, other: Training) -> bool:
    """Tells whether two runs had the same losses, and have the same parameters."""
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return one.losses == other.losses and all(torch.equal(a, b) for a, b in pairs)


def run_seed(seed: int, config: Config, device: torch.device) -> Iterator[dict]:
    """Trains all ways of a seed; yields their rows."""
    text, held_out = read_modules()
    generator = torch.Generator().manual_seed(seed)
    windows = [
        sample(text, config.micro_batches, config, generator).to(device)
        for _ in range(config.windows)
    ]
    tests = sample(held_out, 64, config, generator).to(device)
    done: dict[str, Training] = {}
    for way in WAYS:
        training = Training(way, config, seed, device)
        start = time.perf_counter()
        for window in windows:
            training.train(window)
        seconds = time.perf_counter() - start
        done[way.name] = training
        row = {
            "way": way.name,
            "seed": seed,
            "curve": training.curve(),
            "held_out": training.test(tests),
            "seconds": round(seconds, 1),
        }
        if way.name == LOW_BITS:
            row["same_bits_as_masters"] = same_bits(training, done[MASTERS])
        yield row


def summary(rows: list[dict]) -> list[dict]:
    """Returns, for each way, means over the seeds, and how far from float32's its losses are."""
    references = {row["seed"]: row for row in rows if row["way"] == REFERENCE}
    summaries = []
    for way in WAYS:
        ours = [row for row in rows if row["way"] == way.name]
        apart = []  # |loss - float32's| / float32's, of every point of every seed
        for row in ours:
            pairs = zip(row["curve"], references[row["seed"]]["curve"], strict=True)
            apart += [abs(loss / reference - 1) for loss, reference in pairs]
        bits = [row["same_bits_as_masters"] for row in ours if "same_bits_as_masters" in row]
        summaries.append(
            {
                "way": way.name,
                "final": statistics.mean(row["curve"][-1] for row in ours),
                "held_out": statistics.mean(row["held_out"] for row in ours),
                "mean_apart": statistics.mean(apart),
                "most_apart": max(apart),
                "held_out_over_reference": [
                    row["held_out"] / references[row["seed"]]["held_out"] for row in ours
                ],
                "same_bits_as_masters": all(bits) if bits else None,
            }
        )
    return summaries


def print_summary(summaries: list[dict]) -> None:
    """Prints a line a way."""
    for s in summaries:
        ends = " ".join(f"{ratio - 1:+.2%}" for ratio in s["held_out_over_reference"])
        same = s["same_bits_as_masters"]
        print(
            f"{s['way']:20} loss {s['final']:.4f}, held out {s['held_out']:.4f}; from float32 "
            f"{s['mean_apart']:.2e} in the mean, {s['most_apart']:.2e} at most; held out {ends}"
            + ("" if same is None else f"; the bits of {MASTERS}: {same}")
        )


def main() -> None:
    """Trains; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float)
    options = parser.parse_args()
    device = torch.device(options.device)
    config = CONFIGS[device.type]
    if options.lr:
        config = replace(config, lr=options.lr)
    torch.set_num_threads(1)  # micro-batches this small gain nothing from more
    # Attention whose backward gives the same bits on every run.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    rows = []
    for seed in range(options.seeds):
        for row in run_seed(seed, config, device):
            rows.append(row)
            name, loss, seconds = row["way"], row["held_out"], row["seconds"]
            print(f"seed {seed} {name:20} {loss:.4f} {seconds} s", flush=True)
    summaries = summary(rows)
    print_summary(summaries)
    if options.json:
        result = {
            "environment": environment(device),
            "config": asdict(config),
            "averaged": AVERAGED,
            "summary": summaries,
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
