"""Loops of libraries with their integration and without: the Trainer, accelerate, Lightning.

    python benchmarks/bench_loops.py --json benchmarks/results/loops_h200.json

A Llama of transformers in the shape of Llama-3.2-1B, float32 parameters under bfloat16 autocast,
windows of K micro-batches of T random tokens, clipping, fused AdamW (foreach under Lightning, which
clips no gradients of fused ones). Each loop runs a few windows as its users write it, in several
rounds, because the speed of a host drifts. Time is that of a window, the median of all but a run's
first ones; memory the peak of torch's allocator. All ways of a library see the same model and
micro-batches, so that their losses can be compared.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import report
import torch
from environment import environment
from timing import release
from torch import Tensor, nn
from torch.utils.data import Dataset

import gradacc_kernels as gk

WARM_UP = 3
METHOD = {
    "window": "K micro-batches, clipping at 1.0, a step of AdamW",
    "time": "wall clock between the ends of windows, median of all rounds",
    "memory": "the peak of torch's allocator",
}


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes:
        config: of a Llama.
        tokens: of a micro-batch, of one sequence.
        micro_batches: of a window.
        windows: of a run.
    """

    config: dict
    tokens: int
    micro_batches: int
    windows: int


LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
TOY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
PLANS = {
    "cuda": [
        Plan(LLAMA, tokens=1024, micro_batches=8, windows=10),
        Plan(LLAMA, tokens=4096, micro_batches=4, windows=8),
    ],
    "cpu": [Plan(TOY, tokens=8, micro_batches=2, windows=WARM_UP + 1)],
}


class Texts(Dataset):
    """Random tokens, each a label too."""

    def __init__(self, plan: Plan):
        count = plan.micro_batches * plan.windows
        generator = torch.Generator().manual_seed(0)
        size = count, plan.tokens
        self.tokens = torch.randint(plan.config["vocab_size"], size, generator=generator)

    def __len__(self) -> int:
        """The number of micro-batches."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A sequence."""
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Clock:
    """When windows ended, and the losses of micro-batches."""

    def __init__(self, device: torch.device):
        self.device = device
        self.ends: list[float] = []
        self.losses: list[Tensor] = []

    def tick(self) -> None:
        """A window has ended."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each window but the first ones."""
        times = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return times[WARM_UP - 1 :]


def build(plan: Plan, clock: Clock) -> nn.Module:
    """Returns the model, whose losses the clock keeps."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with clock.device:
        model = LlamaForCausalLM(LlamaConfig(**plan.config, max_position_embeddings=plan.tokens))

    def see(module, inputs, output):
        clock.losses.append(output.loss.detach())

    model.register_forward_hook(see)
    return model


def run_trainer(plan: Plan, clock: Clock, is_integrated: bool, folder: Path) -> None:
    """Transformers' Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Tick(TrainerCallback):
        def on_step_end(self, arguments, state, control, **kwargs):
            clock.tick()

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=plan.micro_batches,
        max_steps=plan.windows,
        bf16=True,
        use_cpu=clock.device.type == "cpu",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(build(plan, clock), arguments, train_dataset=Texts(plan), callbacks=[Tick()])
    if is_integrated:
        trainer.add_callback(gk.integrations.transformers.GradAccCallback(trainer))
    trainer.train()


def run_accelerate(plan: Plan, clock: Clock, is_integrated: bool, folder: Path) -> None:
    """A loop over accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        mixed_precision="bf16",
        gradient_accumulation_steps=plan.micro_batches,
        cpu=clock.device.type == "cpu",
    )
    model = build(plan, clock)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    loader = torch.utils.data.DataLoader(Texts(plan))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if is_integrated:
        gk.integrations.accelerate.prepare(accelerator, model, optimizer)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            clock.tick()
    accelerator.free_memory()


def run_lightning(plan: Plan, clock: Clock, is_integrated: bool, folder: Path) -> None:
    """Lightning's Trainer."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = build(plan, clock)

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=5e-5, foreach=True)

        def on_train_batch_end(self, outputs, batch, index):
            if (index + 1) % plan.micro_batches == 0:
                clock.tick()

    trainer = lightning.Trainer(
        accelerator="cpu" if clock.device.type == "cpu" else "gpu",
        devices=1,
        precision="bf16-mixed",
        accumulate_grad_batches=plan.micro_batches,
        gradient_clip_val=1.0,
        max_steps=plan.windows,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        callbacks=[gk.integrations.lightning.GradAccCallback()] if is_integrated else [],
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(Texts(plan)))


LOOPS: dict[str, Callable[[Plan, Clock, bool, Path], None]] = {
    "transformers": run_trainer,
    "accelerate": run_accelerate,
    "lightning": run_lightning,
}


def measure(library: str, is_integrated: bool, plan: Plan, device: torch.device) -> dict:
    """Runs a loop; returns the seconds of its windows, and what else belongs in its row."""
    clock = Clock(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        LOOPS[library](plan, clock, is_integrated, Path(folder))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {
        "library": library,
        "way": "integration" if is_integrated else "alone",
        "tokens": plan.tokens,
        "micro_batches": plan.micro_batches,
        "windows_s": clock.seconds(),
        "first_loss": clock.losses[0].item(),
        "last_loss": clock.losses[-1].item(),
        "allocated_bytes": peak,
    }


def row_of(runs: list[dict]) -> dict:
    """Returns the row of the runs of one loop, of all rounds."""
    windows = [seconds for run in runs for seconds in run["windows_s"]]
    seconds, last = statistics.median(windows), runs[-1]
    row = last | {"windows_s": windows, "window_s": seconds}
    row["tokens_per_s"] = last["tokens"] * last["micro_batches"] / seconds
    return row


def gigabytes(nbytes: int | None) -> str:
    """Returns a cell of memory, empty where it was not measured."""
    return "" if nbytes is None else f"{nbytes / 1e9:.2f}"


COLUMNS: report.Columns = {
    "library": lambda r: r["library"],
    "way": lambda r: r["way"],
    "T": lambda r: str(r["tokens"]),
    "K": lambda r: str(r["micro_batches"]),
    "window ms": lambda r: f"{1e3 * r['window_s']:.1f}",
    "tokens/s": lambda r: f"{r['tokens_per_s']:.0f}",
    "peak GB": lambda r: gigabytes(r["allocated_bytes"]),
    "first loss": lambda r: f"{r['first_loss']:.5f}",
    "last loss": lambda r: f"{r['last_loss']:.5f}",
}


def main() -> None:
    """Measures, prints a table, and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--libraries", default=",".join(LOOPS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="results file to write")
    options = parser.parse_args()
    device = torch.device(report.device(parser, options.device))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    loops = list(itertools.product(PLANS[device.type], options.libraries.split(","), (False, True)))
    runs: dict[int, list[dict]] = {}
    failures: list[str] = []
    for _ in range(options.rounds):
        for index, (plan, library, is_integrated) in enumerate(loops):
            with report.survived(f"{library}, integrated: {is_integrated}", failures):
                runs.setdefault(index, []).append(measure(library, is_integrated, plan, device))
            release()
    rows = [row_of(runs[index]) for index in sorted(runs)]
    if rows:
        print(report.table(rows, COLUMNS, n_text=2))
    if options.json is not None:
        report.save(options.json, environment(device), rows, method=METHOD, failures=failures)
    report.end(failures)


if __name__ == "__main__":
    main()
