"""Bytes of device memory that training holds for each parameter, and its peaks over that.

    python benchmarks/bench_memory.py --json benchmarks/results/memory_h200.json

A stack of linear layers of 201M parameters, trained by AdamW on so few tokens that activations are
negligible. Held: what is allocated between two micro-batches of the third window, when optimizer
state and gradients exist. Peaks over it: of a micro-batch that adds, and of the step. All are of
torch.cuda.memory_allocated and max_memory_allocated, less what was allocated before the model was
made, workspaces of cuBLAS among it. "rest" is held and in no tensor that could be named: the
16-bit copies of a window, activations, and what the allocator rounds up.

Peaks of MasterParams are those of its buckets of 64M elements, whatever the model's size: a larger
model has fewer bytes a parameter. memory_peers.py has what other libraries document.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from environment import environment
from memory_peers import PEERS
from torch import Tensor, nn

import gradacc_kernels as gk

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Sizes:
    """Of the stack of square layers, without biases, and of a micro-batch."""

    width: int = 4096
    layers: int = 12
    tokens: int = 64


# As many layers as it takes to make every workspace.
WARM_UP = Sizes(width=256, layers=2)


class MastersByHand:
    """AdamW over float32 copies of 16-bit parameters, as loops of PyTorch's users write it."""

    def __init__(self, params: Iterable[Tensor], **options):
        self.params = list(params)
        self.masters = [param.detach().float() for param in self.params]
        self.inner = torch.optim.AdamW(self.masters, **options)

    @property
    def state(self) -> dict:
        """AdamW's."""
        return self.inner.state

    @torch.no_grad()
    def step(self) -> None:
        """Casts the gradients, steps, and rounds."""
        for param, master in zip(self.params, self.masters, strict=True):
            master.grad = param.grad.float()
        self.inner.step()
        self.inner.zero_grad()
        torch._foreach_copy_(self.params, self.masters)

    def zero_grad(self) -> None:
        """Drops the parameters' gradients."""
        for param in self.params:
            param.grad = None


def master_params(params: Iterable[Tensor], low_bits: bool = False, **options) -> gk.MasterParams:
    """Returns AdamW over float32 masters."""
    return gk.MasterParams(params, torch.optim.AdamW, low_bits=low_bits, **options)


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        family: "autocast", of float32 parameters, or "bf16", of bfloat16 ones.
        name: of the row.
        optimizer: makes it from parameters and options of AdamW.
        attach: options of attach, or None for PyTorch's gradients.
        grad_dtype: of PyTorch's gradients where it is not the parameters'.
    """

    family: str
    name: str
    optimizer: Callable
    attach: dict | None = None
    grad_dtype: torch.dtype | None = None


ADAMW = torch.optim.AdamW
LOW_BITS = partial(master_params, low_bits=True)
SKIPPING = {"nonfinite": "skip_micro_batch"}
WAYS = (
    Way("autocast", "PyTorch", ADAMW),
    Way("autocast", "attach(fuse=False)", ADAMW, {"fuse": False}),
    Way("autocast", "attach", ADAMW, {}),
    Way("autocast", 'attach(nonfinite="skip_micro_batch")', ADAMW, SKIPPING),
    Way("bf16", "PyTorch, AdamW in 16 bits", ADAMW),
    Way("bf16", "PyTorch, masters by hand", MastersByHand),
    Way("bf16", "PyTorch, grad_dtype=float32, masters by hand", MastersByHand, None, FP32),
    Way("bf16", "PyTorch, MasterParams(low_bits=True)", LOW_BITS),
    Way("bf16", "attach, MasterParams", master_params, {}),
    Way("bf16", "attach, MasterParams(low_bits=True)", LOW_BITS, {}),
    Way("bf16", 'attach(nonfinite="skip_micro_batch"), MasterParams', master_params, SKIPPING),
)


class Training:
    """A model in training, and what of its memory can be named."""

    def __init__(self, way: Way, sizes: Sizes, device: torch.device):
        self.way, self.device = way, device
        torch.manual_seed(0)
        width = sizes.width
        dtype = BF16 if way.family == "bf16" else FP32
        layers = [
            nn.Linear(width, width, bias=False, device=device, dtype=dtype)
            for _ in range(sizes.layers)
        ]
        self.model = nn.Sequential(*layers)
        self.params = list(self.model.parameters())
        self.x = torch.randn(sizes.tokens, width, device=device).to(dtype)
        if way.grad_dtype is not None:
            for param in self.params:
                param.grad_dtype = way.grad_dtype
        if way.attach is not None:
            gk.attach(self.model, **way.attach)
        self.optimizer = way.optimizer(self.params, lr=1e-4, fused=True)

    def micro_batch(self) -> None:
        """Forward and backward."""
        with torch.autocast(self.device.type, BF16, enabled=self.way.family == "autocast"):
            y = self.model(self.x)
        y.float().square().mean().backward()

    def window(self) -> None:
        """Two micro-batches and a step."""
        self.micro_batch()
        self.micro_batch()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def named_bytes(self) -> dict[str, int]:
        """Bytes of every tensor that can be named, by what it is for."""
        optimizer, masters = self.optimizer, []
        if isinstance(optimizer, MastersByHand):
            masters = optimizer.masters
        elif isinstance(optimizer, gk.MasterParams):
            masters = [*optimizer._masters.values(), *optimizer._lows.values()]
        state = [value for entry in optimizer.state.values() for value in entry.values()]
        chunks = sum(gk.ops.num_chunks(param.numel()) for param in self.params)
        return {
            "parameters": self.nbytes(self.params),
            "gradients": self.nbytes(param.grad for param in self.params),
            "statistics": 4 * chunks if self.way.attach is not None else 0,
            "masters": self.nbytes(masters),
            "optimizer_state": self.nbytes(state),
        }

    def nbytes(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of the storages of tensors on the device, each counted once."""
        storages = [t.untyped_storage() for t in tensors if t.device.type == self.device.type]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class DeviceMemory:
    """Bytes that torch's allocator has given out on the current GPU."""

    def allocated(self) -> int:
        """Now, with all work done."""
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def peak_of(self, call: Callable[[], None]) -> int:
        """The most during a call."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def measure(way: Way, sizes: Sizes, device: torch.device, memory: DeviceMemory) -> dict:
    """Returns the row of a way, in bytes; stops where tensors have more than is allocated."""
    Training(way, WARM_UP, device).window()
    gc.collect()
    before = memory.allocated()
    training = Training(way, sizes, device)
    for _ in range(2):
        training.window()
    training.micro_batch()
    gc.collect()
    held = memory.allocated() - before
    named = training.named_bytes()
    if held < sum(named.values()):
        raise SystemExit(f"{way.name}: {held} bytes are held, but its tensors have {named}")
    micro_batch = memory.peak_of(training.micro_batch) - before
    step = memory.peak_of(training.optimizer.step) - before
    return {
        "family": way.family,
        "way": way.name,
        "elements": sum(param.numel() for param in training.params),
        "held_bytes": held,
        "named_bytes": named,
        "rest_bytes": held - sum(named.values()),
        "micro_batch_peak_bytes": micro_batch,
        "step_peak_bytes": step,
    }


def print_row(row: dict) -> None:
    """Prints a way's bytes per parameter."""
    n = row["elements"]
    more = [row[key] - row["held_bytes"] for key in ("micro_batch_peak_bytes", "step_peak_bytes")]
    named = " ".join(f"{what} {size / n:.2f}" for what, size in row["named_bytes"].items() if size)
    print(
        f"{row['family']:9} {row['way']:52} {row['held_bytes'] / n:6.2f} B held, micro-batch "
        f"{more[0] / n:+5.2f}, step {more[1] / n:+5.2f}: {named} rest {row['rest_bytes'] / n:.2f}",
        flush=True,
    )


def main() -> None:
    """Measures all ways; prints a table, and what peers document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU, and this measures the memory of one")
    device = torch.device("cuda")
    rows = []
    for way in WAYS:
        rows.append(measure(way, Sizes(), device, DeviceMemory()))
        print_row(rows[-1])
        gc.collect()
        torch.cuda.empty_cache()
    print("documented, not measured:")
    for peer in PEERS:
        print(f"{peer.name:72} {peer.bytes_per_param:8} {peer.held}")
    if options.json:
        result = {"environment": environment(device), "sizes": asdict(Sizes()), "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
