"""Trains a small language model three ways, and measures what each does to the gradient.

    pip install rich matplotlib
    python examples/train_lm.py              # one to two minutes on a CPU core
    python examples/train_lm.py --quick      # a few seconds
    torchrun --nproc_per_node=2 examples/train_lm.py --distributed

The text is the source code of Python's own standard library, byte by byte. One optimizer step takes
a window of K micro-batches, and the three ways differ in how the window's gradient comes about:

    PyTorch     bfloat16 parameters, whose .grad sums the K micro-batches in bfloat16
    attach      the same, and one line: gradacc_kernels.attach(model) makes .grad sum in float32
    full batch  the same bfloat16 weights, computed with in float32, the window in one backward

All start from the same weights and are given the same windows. ``--out`` receives train_lm.png, the
gradient's error against K, and train_lm.json, all the numbers.

With ``--distributed`` the processes of torchrun share each window: every rank takes K / R of its
micro-batches, and gradients become their mean over the ranks. PyTorch's way sums them over the
ranks by an all_reduce of each .grad, attach by ``process_group=`` while the last backward runs.
"""

import argparse
import json
import os
import statistics
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm as norm

import gradacc_kernels as gk

try:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
except ImportError as error:
    sys.exit(f"train_lm.py needs rich and matplotlib ({error}): pip install rich matplotlib")


@dataclass
class Config:
    """Sizes of the model, of a micro-batch (sequences of context bytes), and of the run."""

    width: int
    layers: int
    heads: int
    context: int
    sequences: int
    steps: int
    micro_batches: int  # K
    sweep: int  # the largest K in the plot, a power of two
    lr: float


CONFIGS = {
    "cpu": Config(128, 2, 4, 64, 1, steps=200, micro_batches=32, sweep=256, lr=6e-3),
    "cuda": Config(384, 4, 6, 256, 4, steps=80, micro_batches=32, sweep=256, lr=2e-3),
    "quick": Config(64, 1, 2, 64, 1, steps=30, micro_batches=8, sweep=32, lr=1e-2),
}


def rank_and_size() -> tuple[int, int]:
    """Which of how many processes this one is."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(batches: Tensor) -> Tensor:
    """The part of the batches that is this rank's."""
    rank, size = rank_and_size()
    return batches[rank::size]


def average_(tensors: list[Tensor]) -> list[Tensor]:
    """Replaces tensors by their means over the ranks, in their own dtype, and returns them."""
    _, size = rank_and_size()
    if size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= size
    return tensors


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape of x: [batch, context, width]."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, context, width / heads]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    """A decoder-only transformer over bytes."""

    def __init__(self, config: Config):
        super().__init__()
        self.bytes = nn.Embedding(256, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        blocks = [Block(config.width, config.heads) for _ in range(config.layers)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, 256, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """The mean loss, in nats a byte, of predicting each byte of text [batch, context + 1]."""
        x = self.bytes(text[:, :-1]) + self.positions.weight
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())


class MasterAdamW:
    """AdamW on float32 copies of the parameters, which follow them rounded to bfloat16."""

    def __init__(self, model: nn.Module, config: Config):
        self.params = list(model.parameters())
        self.masters = [param.detach().float().clone() for param in self.params]
        self.adamw = torch.optim.AdamW(self.masters, config.lr, betas=(0.9, 0.95))
        warmup = max(1, config.steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adamw, lambda step: min((step + 1) / warmup, 1 - 0.9 * step / config.steps)
        )

    @torch.no_grad()
    def step(self) -> None:
        """Reads the parameters' .grad, whatever its dtype, and writes the parameters."""
        for master, param in zip(self.masters, self.params, strict=True):
            master.grad = param.grad.float()
        self.adamw.step()
        self.adamw.zero_grad()
        self.schedule.step()
        torch._foreach_copy_(self.params, [master.bfloat16() for master in self.masters])


class Way:
    """A model in training, and what was measured of it."""

    def __init__(self, name: str, config: Config, seed: int, device: str, full_batch=False):
        self.name = name
        self.device = device
        self.full_batch = full_batch
        torch.manual_seed(seed)
        self.model = LanguageModel(config).to(device, torch.bfloat16)
        if full_batch:
            self.model.float()
        self.optimizer = MasterAdamW(self.model, config)
        self.losses: list[float] = []  # of each window
        self.times: list[float] = []  # ms, forward and backward of a micro-batch
        self.grad_bytes = 0

    def train(self, window: Tensor) -> None:
        """One optimizer step on a window: [K, sequences, context + 1]."""
        window = share(window)
        batches = window.flatten(0, 1)[None] if self.full_batch else window
        total = 0.0
        for batch in batches:
            start = time.perf_counter()
            loss = self.model(batch) / len(batches)
            loss.backward()
            total += loss.item()  # waits for the device
            elapsed = time.perf_counter() - start
            self.times.append(1e3 * elapsed * len(batches) / len(window))
        self.losses.append(total)
        if self.name != "attach":  # whose gradients the last backward has averaged
            average_([param.grad for param in self.model.parameters()])
        self.grad_bytes = grad_bytes(self.model)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.model.zero_grad()

    def training_loss(self) -> float:
        """Returns the mean loss of the last ten windows."""
        losses = torch.tensor(self.losses[-10:], dtype=torch.float64, device=self.device)
        return average_([losses])[0].mean().item()

    @torch.no_grad()
    def test(self, batches: Tensor) -> float:
        """Returns the mean loss."""
        return statistics.mean(self.model(batch).item() for batch in batches)


def grad_bytes(model: nn.Module) -> int:
    """Bytes held for gradients; attach's statistics are a float32 for each chunk of a gradient."""
    params = list(model.parameters())
    storages = [param.grad.untyped_storage() for param in params]
    nbytes = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if hasattr(params[0], "main_grad"):
        nbytes += 4 * sum(gk.ops.num_chunks(param.numel()) for param in params)
    return nbytes


def read_standard_library() -> tuple[Tensor, Tensor]:
    """The bytes of Python's own modules to train on, and those of every tenth one, held out."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    paths = sorted(path for path in paths if skipped.isdisjoint(path.parts))
    if len(paths) < 100:
        sys.exit(f"Expected the standard library's source in {root}, found {len(paths)} modules")
    texts = [(root / path).read_bytes() for path in paths]
    held_out = b"".join(texts[::10])
    del texts[::10]
    training = b"".join(texts)
    return tuple(torch.frombuffer(bytearray(t), dtype=torch.uint8) for t in (training, held_out))


class ExactSum:
    """The float64 sum of the gradients that reach a model's parameters, whatever sums them then."""

    def __init__(self, model: nn.Module):
        params = list(model.parameters())
        self.sums = [torch.zeros_like(param, dtype=torch.float64) for param in params]
        self.magnitudes = [torch.zeros_like(total) for total in self.sums]
        for i, param in enumerate(params):
            param.register_hook(lambda grad, i=i: self._add(i, grad))

    def _add(self, i: int, grad: Tensor) -> None:
        self.sums[i] += grad
        self.magnitudes[i] += grad.abs()

    def error_of(self, model: nn.Module) -> float:
        """|grad - sum| / |sum|, in L2 over all parameters; of the means of R ranks."""
        grads = average_([param.grad.clone() for param in model.parameters()])
        sums = average_([total.clone() for total in self.sums])
        errors = [grad - total for grad, total in zip(grads, sums, strict=True)]
        return (norm(errors) / norm(sums)).item()

    def bound(self, k: int) -> float:
        """The same for any float32 sum of k terms, at the most: (k + R) 2^-24 sum|terms|."""
        _, size = rank_and_size()
        sums, magnitudes = (
            average_([total.clone() for total in totals]) for totals in (self.sums, self.magnitudes)
        )
        return (k + size) * 2.0**-24 * (norm(magnitudes) / norm(sums)).item()


def gradient_errors(ways: list[Way], batches: Tensor, ks: list[int]) -> dict[str, list]:
    """Errors of the sum of the first k micro-batch gradients, for each k, at equal weights.

    Each rank has k / R of them. What attach has averaged in between stays as it is when averaged
    again.

    Against the float64 sum of the very bfloat16 gradients that autograd made. So the error of the
    first two ways is what summation did; that of the third, in float32 throughout (and here with
    one backward a micro-batch), is what bfloat16 did to the gradients before they were summed.
    """
    pytorch, attached, full_batch = ways
    for way in ways:
        way.model.load_state_dict(full_batch.model.state_dict())
    exact = {way.name: ExactSum(way.model) for way in (pytorch, attached)}
    exact[full_batch.name] = exact[pytorch.name]
    errors = {"k": ks, "bound": [], **{way.name: [] for way in ways}}
    _, size = rank_and_size()
    for k, batch in zip(range(size, len(batches) + 1, size), share(batches), strict=True):
        for way in ways:
            way.model(batch).backward()
        if k in ks:
            errors["bound"].append(exact[attached.name].bound(k))
            for way in ways:
                errors[way.name].append(exact[way.name].error_of(way.model))
    return errors


def plot(errors: dict[str, list], path: Path) -> None:
    """Draws gradient error against the number of micro-batches, on logarithmic axes."""
    lines = {
        "PyTorch": ("summed in bfloat16: PyTorch's .grad", "#c0392b", "o-"),
        "attach": ("summed in float32: gradacc_kernels.attach", "#1f5fa8", "o-"),
        "full batch": ("full batch in float32: what bfloat16 arithmetic costs", "#7f8c8d", "s:"),
        "bound": ("upper bound for any float32 sum", "#7fa6d4", "--"),
    }
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="K, micro-batches summed (one alone has no error)", ylabel="relative error"
    )
    for name, (label, color, style) in lines.items():
        # One gradient is summed without error, and a logarithm has no zero.
        shown = [(k, error) for k, error in zip(errors["k"], errors[name], strict=True) if error]
        axes.loglog(*zip(*shown, strict=True), style, color=color, label=label)
    axes.set_title("Error of the gradient of K micro-batches (L2 over all parameters)")
    axes.set_xticks(errors["k"], labels=errors["k"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


COLUMNS = {
    "way": "",
    "gradient error": ".1e",
    "training loss": ".4f",
    "held-out loss": ".4f",
    "ms a micro-batch": ".2f",
    "gradient bytes": ",",
}


def print_results(rows: list[dict], k: int, console: Console) -> None:
    """Prints the table, and what can be said of it."""
    caption = (
        "Gradient error: relative L2 distance from the float64 sum of the same bfloat16 gradients. "
        "The full batch is computed in float32: its figure is what bfloat16 did to the gradients "
        "before they were summed. Losses: nats a byte."
    )
    table = Table(
        title=f"One model, trained three ways, K = {k}", caption=caption, caption_justify="left"
    )
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for row in rows:
        table.add_row(*(format(row[heading], spec) for heading, spec in COLUMNS.items()))
    console.print(table)
    losses = [row["held-out loss"] for row in rows]
    spread = max(losses) / min(losses) - 1
    stock, ours = (row["gradient error"] for row in rows[:2])
    if spread < 0.01 and ours < 0.01 * stock:
        console.print(
            f"On a model this small the final loss hardly differs: by {spread:.2%} at the most. "
            f"What differs is the gradient: summing it costs an error of {stock:.1e} in bfloat16, "
            f"and of {ours:.1e} with attach.",
            style="bold",
        )


def parse_arguments() -> tuple[argparse.Namespace, Config]:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--micro-batches", type=int, metavar="K", help="micro-batches a window")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for PNG and JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto", help="of attach: auto, cuda, triton, ...")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few seconds")
    parser.add_argument("--distributed", action="store_true", help="as a rank of torchrun")
    arguments = parser.parse_args()
    kind = arguments.device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {arguments.device}")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    config = CONFIGS["quick" if arguments.quick else kind]
    config.steps = arguments.steps or config.steps
    config.micro_batches = arguments.micro_batches or config.micro_batches
    if min(config.steps, config.micro_batches) < 1:
        parser.error("--steps and --micro-batches must be positive")
    if arguments.distributed and "LOCAL_RANK" not in os.environ:
        parser.error("--distributed: start it by torchrun --nproc_per_node=2 examples/train_lm.py")
    size = int(os.environ["WORLD_SIZE"]) if arguments.distributed else 1
    if config.micro_batches % size:
        parser.error(f"--micro-batches must be a multiple of the {size} ranks")
    return arguments, config


def join_ranks(kind: str) -> str:
    """Makes this process a rank of torchrun's; returns its device."""
    if kind == "cpu":
        dist.init_process_group("gloo")
        return kind
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return str(device)


def main() -> None:
    """Trains, measures, and reports."""
    arguments, config = parse_arguments()
    device, reduction = arguments.device, {}
    if arguments.distributed:
        device = join_ranks(device.split(":")[0])
        steps = config.micro_batches // dist.get_world_size()
        reduction = {"process_group": dist.group.WORLD, "steps": steps}
    rank, size = rank_and_size()
    training, held_out = read_standard_library()
    generator = torch.Generator().manual_seed(arguments.seed)
    console = Console(quiet=rank > 0)
    torch.set_num_threads(1)  # micro-batches this small gain little, and a busy machine gains much
    k = config.micro_batches

    def sample(text: Tensor, count: int) -> Tensor:
        shape = (count, config.sequences, 1)
        starts = torch.randint(len(text) - config.context, shape, generator=generator)
        return text[starts + torch.arange(config.context + 1)].long().to(device)

    ways = [
        Way("PyTorch", config, arguments.seed, device),
        Way("attach", config, arguments.seed, device),
        Way("full batch", config, arguments.seed, device, full_batch=True),
    ]
    # The one line that differs.
    gk.attach(ways[1].model, backend=arguments.backend, **reduction)

    with Progress(console=console) as progress:
        for _ in progress.track(range(config.steps), description="training"):
            window = sample(training, k)
            for way in ways:
                way.train(window)

    tests = sample(held_out, 256)
    rows = [
        {
            "way": way.name,
            "training loss": way.training_loss(),
            "held-out loss": way.test(tests),
            "ms a micro-batch": statistics.median(way.times),
            "gradient bytes": way.grad_bytes,
        }
        for way in ways
    ]
    ks = sorted({k} | {2**i for i in range(config.sweep.bit_length()) if 2**i % size == 0})
    errors = gradient_errors(ways, sample(training, ks[-1]), ks)
    for row in rows:
        row["gradient error"] = errors[row["way"]][ks.index(k)]
    print_results(rows, k, console)
    if rank == 0:
        write(arguments, config, rows, errors, console)
    if arguments.distributed:
        dist.destroy_process_group()


def write(
    arguments: argparse.Namespace,
    config: Config,
    rows: list[dict],
    errors: dict[str, list],
    console: Console,
) -> None:
    """Writes the picture and the numbers."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot(errors, arguments.out / "train_lm.png")
    report = {
        "torch": torch.__version__,
        "ranks": rank_and_size()[1],
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "config": asdict(config),
        "ways": rows,
        "gradient errors": errors,
    }
    (arguments.out / "train_lm.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"Wrote train_lm.png and train_lm.json to {arguments.out.resolve()}")


if __name__ == "__main__":
    main()
