"""The eager part of bench_training.py: loops as users write them, without CUDA graphs.

A window is zero_grad and 4 micro-batches of forward and backward. Wall-clock time, which is the
host's where models or batches are small, and the peak of allocated memory. The models have random
weights and are built from configurations alone; nothing is downloaded.

A window's gradients are first compared with those of the same weights and data in float32: ours
are timed only where their error is no larger than PyTorch's. The ways' windows then take turns, for
a host's speed drifts by a third within seconds; "/ PyTorch" is the median over the turns.
"""

from __future__ import annotations

import argparse
import collections
import copy
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import llama
import report
import torch
from environment import environment
from gradient_ways import Stock, Way, ours
from timing import release, sample_wall, wall_timing
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WINDOW = 4
TOKENS = {"cuda": [512, 2048], "cpu": [32]}
QUICK_MODELS = ["llama-1.5b", "llama-3.2-1b", "gpt2", "qwen3-0.6b", "vit-large"]
SAMPLES = 1 << 20  # elements of the gradient that are compared
NO_LARGER = 1.02  # than PyTorch's error: attention and embeddings sum with atomics


@dataclass(frozen=True)
class Model:
    """A model and its data.

    Attributes:
        build: (dtype, device) -> the model.
        batch: (tokens, dtype, device) -> arguments of a micro-batch of about that many tokens, and
            how many they are.
        loss: (model, arguments) -> its loss.
    """

    build: Callable[[torch.dtype, torch.device], nn.Module]
    batch: Callable[[int, torch.dtype, torch.device], tuple[dict[str, Tensor], int]]
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]


def own_llama(is_toy: bool) -> Model:
    """Returns the model of bench_training.py."""
    toy = llama.Shape(256, width=64, layers=2, heads=4, kv_heads=2, mlp=128, positions=64)
    shape = toy if is_toy else llama.Shape()

    def batch(n_tokens, dtype, device):
        text = torch.randint(shape.vocabulary, (1, n_tokens + 1), device=device)
        return {"tokens": text[:, :-1].contiguous(), "targets": text[:, 1:].contiguous()}, n_tokens

    return Model(
        build=lambda dtype, device: llama.build(shape, dtype, device),
        batch=batch,
        loss=lambda model, arguments: model(**arguments),
    )


def language_model(config_name: str, longest: int, **sizes) -> Model:
    """Returns a causal language model of transformers."""

    def build(dtype, device):
        import transformers

        config = getattr(transformers, config_name)(**sizes)
        with device:
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", dtype=dtype
            )
        return model.train()

    def batch(n_tokens, dtype, device):
        length = min(n_tokens, longest)
        tokens = torch.randint(sizes["vocab_size"], (n_tokens // length, length), device=device)
        return {"input_ids": tokens, "labels": tokens}, tokens.numel()

    def loss(model, arguments):
        return model(**arguments, use_cache=False).loss

    return Model(build, batch, loss)


def vision_model(**sizes) -> Model:
    """Returns an image classifier of transformers."""
    tokens_per_image = (sizes["image_size"] // sizes["patch_size"]) ** 2 + 1

    def build(dtype, device):
        import transformers

        config = transformers.ViTConfig(**sizes, num_labels=1000)
        with device:
            model = transformers.AutoModelForImageClassification.from_config(
                config, attn_implementation="sdpa", dtype=dtype
            )
        return model.train()

    def batch(n_tokens, dtype, device):
        count = max(1, round(n_tokens / tokens_per_image))
        shape = count, 3, sizes["image_size"], sizes["image_size"]
        images = torch.randn(shape, device=device).to(dtype)
        labels = torch.randint(1000, (count,), device=device)
        return {"pixel_values": images, "labels": labels}, count * tokens_per_image

    return Model(build, batch, lambda model, arguments: model(**arguments).loss)


def models(is_toy: bool) -> dict[str, Model]:
    """Returns the models, or ones of the same kinds that a CPU runs at once."""
    llama_1b = {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    gpt2 = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
    gpt2_medium = {**gpt2, "n_embd": 1024, "n_layer": 24, "n_head": 16}
    qwen = {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    }
    vit = {
        "image_size": 224,
        "patch_size": 16,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    if is_toy:
        small = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16}
        small |= {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        llama_1b, qwen = llama_1b | small, qwen | small
        gpt2 = {"vocab_size": 256, "n_positions": 16, "n_embd": 64, "n_layer": 2, "n_head": 4}
        gpt2_medium = gpt2
        vit = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "intermediate_size": 128}
        vit |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "llama-1.5b": own_llama(is_toy),
        "llama-3.2-1b": language_model("LlamaConfig", 8192, **llama_1b),
        "gpt2": language_model("GPT2Config", gpt2["n_positions"], **gpt2, **no_dropout),
        "gpt2-medium": language_model(
            "GPT2Config", gpt2["n_positions"], **gpt2_medium, **no_dropout
        ),
        "qwen3-0.6b": language_model("Qwen3Config", 8192, **qwen),
        "vit-large": vision_model(**vit),
    }


MODELS = tuple(models(is_toy=True))


def micro_batches(
    model: Model, n_tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[dict[str, Tensor]], int]:
    """Returns a window's data, and how many tokens a micro-batch has."""
    torch.manual_seed(1)
    made = [model.batch(n_tokens, dtype, device) for _ in range(WINDOW)]
    return [arguments for arguments, _ in made], made[0][1]


@dataclass
class Loop:
    """A window's worth of a user's training loop, without the optimizer, summed in one way."""

    model: Model
    module: nn.Module
    sums: Stock
    way: Way
    batches: list[dict[str, Tensor]] = field(default_factory=list)

    def window(self) -> None:
        """Runs it."""
        self.sums.zero()
        for arguments in self.batches:
            with self.way.autocast(self.sums.params[0].device):
                loss = self.model.loss(self.module, arguments)
            loss.backward()

    def sample(self) -> Tensor:
        """Returns some elements of the gradient, float64."""
        return sample_of([grad for grad in self.sums.grads() if grad is not None])


def to_float(value: Tensor) -> Tensor:
    """Returns data as a model in float32 takes it."""
    return value.float() if value.is_floating_point() else value


def sample_of(grads: Sequence[Tensor]) -> Tensor:
    """Returns every so many-th element of gradients, float64 on the CPU."""
    step = max(1, sum(grad.numel() for grad in grads) // SAMPLES)
    return torch.cat([grad.flatten()[::step].double() for grad in grads]).cpu()


def memory_of(loop: Loop, before: int) -> dict:
    """Returns the memory between windows and the peak of one, without what was there before."""
    if not torch.cuda.is_available():
        return {"between_bytes": None, "peak_bytes": None}
    loop.sums.zero()
    torch.cuda.synchronize()
    between = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loop.window()
    peak = torch.cuda.max_memory_allocated()
    return {"between_bytes": between - before, "peak_bytes": peak - before}


def sample_in_turns(loops: Sequence[Loop], seconds: float, min_rounds: int) -> list[list[tuple]]:
    """Returns samples of each loop's window. A round has one of all, and each is first in turn."""
    samples: list[list[tuple]] = [[] for _ in loops]
    end = time.perf_counter() + seconds
    order = collections.deque(zip(loops, samples, strict=True))
    gc.collect()
    gc.disable()
    try:
        while len(samples[0]) < min_rounds or time.perf_counter() < end:
            for loop, own in order:
                own += sample_wall(loop.window, seconds=0, min_repetitions=1)
            order.rotate()
    finally:
        gc.enable()
    return samples


def exact_samples(
    model: Model,
    module: nn.Module,
    dtype: torch.dtype,
    tokens: Sequence[int],
    device: torch.device,
) -> dict[int, Tensor]:
    """Returns what a window sums for each length, from weights and data of dtype, in float32."""
    module = copy.deepcopy(module).float()
    samples = {}
    for n_tokens in tokens:
        module.zero_grad()
        for arguments in micro_batches(model, n_tokens, dtype, device)[0]:
            arguments = {name: to_float(value) for name, value in arguments.items()}
            model.loss(module, arguments).backward()
        samples[n_tokens] = sample_of([p.grad for p in module.parameters() if p.grad is not None])
    return samples


def relative_error(sample: Tensor, exact: Tensor) -> float:
    """Returns the relative L2 error of gradients."""
    return float(torch.linalg.vector_norm(sample - exact) / torch.linalg.vector_norm(exact))


def check_no_larger(error: float, limit: float) -> None:
    """Raises RuntimeError where an error is larger than PyTorch's."""
    if not error <= NO_LARGER * limit:
        raise RuntimeError(f"expected at most PyTorch's error, {limit:.4g}, got {error:.4g}")


def run_model(
    name: str,
    model: Model,
    family: str,
    options: argparse.Namespace,
    device: torch.device,
    failures: list[str],
) -> list[dict]:
    """Returns the rows of one model. All ways stand beside each other, and take turns."""
    ways = ours(family)
    seconds, min_rounds = (1.5, 6) if options.quick else (3, 9)
    if device.type == "cpu":
        seconds, min_rounds = 0, 3
    torch.manual_seed(0)
    built = model.build(ways[0].dtype, device)
    exact = exact_samples(model, built, ways[0].dtype, options.tokens, device)
    release()
    loops: list[Loop] = []
    found: dict[tuple[int, str], dict] = {}
    for way in ways:
        with report.survived(f"{name}, {family}, {way.name}", failures):
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            module = copy.deepcopy(built)
            loop = Loop(model, module, way.set_up(module), way)
            for n_tokens in options.tokens:
                loop.batches, actual = micro_batches(model, n_tokens, way.dtype, device)
                loop.window()
                error = relative_error(loop.sample(), exact[n_tokens])
                check_no_larger(error, found.get((n_tokens, "stock"), {"error": error})["error"])
                found[n_tokens, way.role] = {
                    "model": name,
                    "family": family,
                    "name": way.name,
                    "role": way.role,
                    "tokens": actual,
                    "window": WINDOW,
                    "error": error,
                    **memory_of(loop, before),
                }
            loops.append(loop)
        loop = module = None
        release()
    built = None
    rows = []
    for n_tokens in options.tokens:
        for loop in loops:
            loop.batches, _ = micro_batches(model, n_tokens, loop.way.dtype, device)
            loop.window()
        samples = sample_in_turns(loops, seconds, min_rounds)
        for loop, own in zip(loops, samples, strict=True):
            timing = wall_timing(own, WINDOW)
            ratios = [mine[0] / theirs[0] for mine, theirs in zip(own, samples[0], strict=True)]
            row = {**found[n_tokens, loop.way.role], **report.times(timing)}
            if loops[0].way.role == "stock":
                row["over_stock"] = round(statistics.median(ratios), 4)
            rows.append(row)
            report.say(f"{name} {family} T={row['tokens']} {row['name']}: {timing.p50:.0f} us")
    loops.clear()
    release()
    return rows


def ratio_to_stock(rows: Sequence[dict], quantity: str) -> Callable[[dict], str]:
    """Returns a column: a quantity over PyTorch's."""
    keys = ("model", "family", "tokens")
    others = {tuple(r[k] for k in keys): r[quantity] for r in rows if r["role"] == "stock"}

    def ratio(row: dict) -> str:
        other = others.get(tuple(row[k] for k in keys))
        return f"{row[quantity] / other:.3f}" if other else ""

    return ratio


def summary(rows: Sequence[dict]) -> str:
    """Returns the table that a run ends with."""

    def gigabytes(nbytes: int | None) -> str:
        return "" if nbytes is None else f"{nbytes / 1e9:.2f}"

    columns = {
        "model": lambda r: r["model"],
        "parameters": lambda r: r["family"],
        "gradients": lambda r: r["name"],
        "T": lambda r: str(r["tokens"]),
        "p20 ms": lambda r: f"{r['p20_us'] / 1e3:.2f}",
        "p50 ms": lambda r: f"{r['p50_us'] / 1e3:.2f}",
        "p80 ms": lambda r: f"{r['p80_us'] / 1e3:.2f}",
        "/ PyTorch": lambda r: f"{r['over_stock']:.3f}" if "over_stock" in r else "",
        "error": lambda r: f"{r['error']:.3e}",
        "host ms": lambda r: f"{r['host_us'] / 1e3:.2f}",
        "peak GB": lambda r: gigabytes(r["peak_bytes"]),
        "peak / PyTorch": ratio_to_stock(rows, "peak_bytes"),
    }
    return report.table(rows, columns, n_text=3)


def run(options: argparse.Namespace, device: torch.device, failures: list[str]) -> None:
    """Measures all models; saves after each."""
    chosen = models(is_toy=device.type == "cpu")
    names = options.models or (QUICK_MODELS if options.quick else list(chosen))
    options.tokens = options.tokens or TOKENS[device.type]
    measured_with = environment(device) | {"transformers": None}
    try:
        import transformers

        measured_with["transformers"] = transformers.__version__
    except ImportError:
        report.say("without the models of transformers: it is not installed")
        names = [name for name in names if name == "llama-1.5b"]
    rows: list[dict] = []
    for name in names:
        for family in options.families:
            rows += run_model(name, chosen[name], family, options, device, failures)
            if options.json:
                report.save(options.json, measured_with, rows)
    if rows:
        print(summary(rows))
