"""Trains a small UNet to take noise out of pictures, as diffusion models do, in float16.

    python examples/denoise_images.py              # one to two minutes on a CPU core
    python examples/denoise_images.py --quick      # a few seconds

Parameters, activations and gradients are float16. Losses are multiplied by the loss scale of
gk.GradScaler, gradients are divided by it as they are added to the float32 sums, and a window with
an overflow is skipped. gk.MasterParams steps float32 masters. The first loss scale is too large:
windows are skipped until it fits. --record run.jsonl writes what each window was, of which
`python -m gradacc_kernels report run.jsonl` makes a page.
"""

import argparse
import math
import time
from pathlib import Path

import pictures
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradacc_kernels as gk


class Block(nn.Module):
    """x + two convolutions, between which the noise level is added."""

    def __init__(self, before: int, width: int, levels: int):
        super().__init__()
        self.skip = nn.Conv2d(before, width, 1)
        self.first = nn.Conv2d(before, width, 3, padding=1)
        self.level = nn.Linear(levels, width)
        self.norm = nn.GroupNorm(4, width)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Keeps height and width."""
        y = self.first(x) + self.level(level)[..., None, None]
        return self.skip(x) + self.second(F.silu(self.norm(y)))


class UNet(nn.Module):
    """Predicts the noise in images [n, 3, size, size], the size a multiple of 4."""

    LEVELS = 16  # features of the noise level

    def __init__(self, width: int):
        super().__init__()
        sizes = [width, 2 * width, 2 * width]
        befores = [3, *sizes[:-1]]
        self.down = nn.ModuleList(
            Block(before, size, self.LEVELS) for before, size in zip(befores, sizes, strict=True)
        )
        self.up = nn.ModuleList(
            Block(below + beside, beside, self.LEVELS)
            for below, beside in zip(sizes[:0:-1], sizes[-2::-1], strict=True)
        )
        self.out = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Takes the share of noise of each image, [n] from 0 to 1."""
        waves = noise[:, None] * torch.arange(1, self.LEVELS + 1, device=x.device) * math.pi
        level = waves.cos().to(x.dtype)
        beside = []
        for number, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if number else x, level)
            beside.append(x)
        for block, other in zip(self.up, beside[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2), other], 1), level)
        return self.out(x)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=default)
    parser.add_argument("--windows", type=int, default=40 if default == "cpu" else 200)
    parser.add_argument("--micro-batches", type=int, default=4, help="K, in a window")
    parser.add_argument("--images", type=int, default=8, help="in a micro-batch")
    parser.add_argument("--size", type=int, default=16, help="of an image, a multiple of 4")
    parser.add_argument("--width", type=int, default=16, help="channels of the UNet's first level")
    parser.add_argument("--record", type=Path, help="JSON lines, one a window")
    parser.add_argument("--quick", action="store_true", help="8 windows of a small UNet")
    options = parser.parse_args()
    if options.quick:
        options.windows, options.images, options.size, options.width = 8, 4, 16, 8
    return options


def main() -> None:
    """Trains, and prints losses, the loss scale, and what of windows was skipped."""
    options = parse_arguments()
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = UNet(options.width).to(device, torch.float16)
    accumulator = gk.attach(model, scale=1 / options.micro_batches)
    print(accumulator)
    optimizer = gk.MasterParams(model.parameters(), torch.optim.AdamW, lr=2e-3)
    scaler = gk.GradScaler(accumulator, init_scale=2.0**20, growth_interval=20)
    sinks = [] if options.record is None else [gk.JsonLines(options.record)]
    monitor = gk.Monitor(accumulator, sinks)

    def loss_of(seed: int) -> Tensor:
        images, _ = pictures.draw(options.images, options.size, device, seed)
        share = torch.rand(len(images), device=device)
        added = torch.randn_like(images)
        mixed = (1 - share).sqrt()[:, None, None, None] * images
        mixed = mixed + share.sqrt()[:, None, None, None] * added
        return F.mse_loss(model(mixed.half(), share).float(), added)

    began = time.perf_counter()
    for window in range(options.windows):
        losses = []
        for index in range(options.micro_batches):
            loss = loss_of(1 + window * options.micro_batches + index)
            scaler.scale(loss).backward()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        monitor.log(loss=mean)
        accumulator.step(optimizer, max_norm=1.0, scaler=scaler)
        if window % max(1, options.windows // 6) == 0 or window == options.windows - 1:
            stats = accumulator.stats()
            overflow = f", overflow in {stats.nonfinite[0]}" if stats.found_inf else ""
            print(
                f"window {window:3}: loss {mean.item():.3f}, loss scale {stats.loss_scale:.0f}, "
                f"skipped {stats.skipped_windows}{overflow}"
            )
        scaler.update()
        optimizer.zero_grad()
    monitor.close()
    print(f"{options.windows} windows in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
